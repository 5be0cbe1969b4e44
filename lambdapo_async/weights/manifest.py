"""One weight file on its way through a store: what is published, and what a reader must know to trust it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import msgpack
import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from lambdapo_async.errors import WeightsError, WeightsLostError
from lambdapo_async.seal import Seal, SealError
from lambdapo_async.weights.catch_up import Available
from lambdapo_async.weights.tensor_file import Payload

CHUNK_BYTES = 2 * 1024**2
"""Measured: 64 MB pieces cost a third of the reading speed and stall the rollout queue for 460 ms."""


_PURPOSE = "weights manifest"


@dataclass(frozen=True, slots=True)
class NewFile:
    """One file to publish."""

    available: Available
    payload: bytes
    """The whole file as it goes over the wire."""

    def __post_init__(self) -> None:
        if not self.payload or len(self.payload) != self.available.num_bytes:
            raise WeightsError(
                f"{name_of(self.available)} has {len(self.payload)} bytes, announced are {self.available.num_bytes}"
            )


def name_of(file: Available) -> str:
    """What a file is called in a store: at most one of each kind leads to a version."""
    if file.base_version is None:
        return f"{file.version}.full"
    return f"{file.version}.step" if file.base_min is None else f"{file.version}.union"


def check_version(version: int, files: Sequence[NewFile]) -> None:
    """``WeightsError`` unless there are files, each of another kind, and all lead to ``version``."""
    names = [name_of(file.available) for file in files]
    if not files or len(set(names)) < len(names) or any(file.available.version != version for file in files):
        raise WeightsError(f"version {version} cannot consist of the files {names}")


def base_of(files: Sequence[NewFile]) -> int | None:
    """The version that a reader must have for ``files`` to lead anywhere; None if one of them is whole."""
    bases = [file.available.base_version for file in files]
    return None if None in bases else max(base for base in bases if base is not None)


def pack_available(file: Available) -> bytes:
    """A file as the catalogue of a store lists it."""
    packed: bytes = msgpack.packb([file.version, file.num_bytes, file.base_version, file.base_min])
    return packed


def unpack_available(packed: bytes) -> Available:
    """The reverse; ``WeightsError`` if the entry is damaged."""
    try:
        fields = msgpack.unpackb(packed)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise WeightsError(f"the list of weight files is damaged: {error}") from error
    match fields:
        case [int(version), int(num_bytes), int() | None as base_version, int() | None as base_min]:
            return Available(version=version, num_bytes=num_bytes, base_version=base_version, base_min=base_min)
    raise WeightsError(f"the list of weight files is damaged: {fields!r:.200}")


class Manifest(BaseModel):
    """Where a file's bytes lie and what they must be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    num_bytes: int
    digest: str
    """xxh3_128 of the whole file in hexadecimal."""
    chunk_bytes: tuple[int, ...] = ()
    """Length of each piece in Redis; none when the file lies elsewhere."""
    chunk_digests: tuple[int, ...] = ()
    """xxh3_64 of each piece."""
    url: str | None = None
    """Where the file lies; None if in Redis."""
    blake2b: str = ""
    """BLAKE2b-256 of the whole file in hexadecimal, where the manifest is signed: the other digests tell damage from
    what was published, but whoever wants to can make a file that has them."""

    @classmethod
    def in_chunks(cls, file: NewFile) -> Self:
        """Of a file that goes into Redis."""
        chunks = cut(file.payload)
        return cls(
            name=name_of(file.available),
            num_bytes=len(file.payload),
            digest=xxhash.xxh3_128_hexdigest(file.payload),
            chunk_bytes=tuple(len(chunk) for chunk in chunks),
            chunk_digests=tuple(xxhash.xxh3_64_intdigest(chunk) for chunk in chunks),
        )

    @classmethod
    def elsewhere(cls, file: NewFile, url: str) -> Self:
        """Of a file that goes to ``url``."""
        digest = xxhash.xxh3_128_hexdigest(file.payload)
        return cls(name=name_of(file.available), num_bytes=len(file.payload), digest=digest, url=url)

    def signed_for(self, file: NewFile, seal: Seal) -> "Manifest":
        """With the digest that makes a signature of the manifest one of the file; unchanged where nothing is signed."""
        return self.model_copy(update={"blake2b": _blake2b(file.payload)}) if seal.is_on else self

    @classmethod
    def unpack(cls, packed: bytes, *, name: str, seal: Seal) -> Self:
        """The manifest of file ``name``; ``WeightsError`` if it is damaged, of another file or not signed by us."""
        try:
            manifest = cls.model_validate(msgpack.unpackb(seal.open(packed, purpose=_PURPOSE)))
        except SealError as error:
            raise WeightsError(f"the manifest of {name} cannot be trusted: {error}") from error
        except (ValueError, ValidationError, msgpack.UnpackException) as error:
            raise WeightsError(f"the manifest of {name} is damaged: {error}") from error
        if seal.is_on and not manifest.blake2b:
            raise WeightsError(f"the manifest of {name} cannot be trusted: it lacks the digest of its file")
        if manifest.name != name or len(manifest.chunk_digests) != len(manifest.chunk_bytes):
            raise WeightsError(f"the manifest of {name} is damaged: it describes {manifest.name}")
        return manifest

    def pack(self, seal: Seal) -> bytes:
        """As it lies in Redis."""
        return seal.close(msgpack.packb(self.model_dump()), purpose=_PURPOSE)

    def check_lengths(self, lengths: Sequence[int]) -> None:
        """``WeightsError`` unless the pieces of a file this long have these lengths."""
        if self.chunk_bytes != tuple(lengths):
            raise WeightsError(f"the manifest of {self.name} is damaged: its chunks are not those of its length")

    def check_chunk(self, index: int, chunk: bytes | memoryview | None) -> bytes | memoryview:
        """``chunk`` if it is the one that was published; ``WeightsError`` otherwise, ``WeightsLostError`` for none."""
        if chunk is None:
            raise WeightsLostError(f"chunk {index} of {self.name} is gone")
        if len(chunk) != self.chunk_bytes[index] or xxhash.xxh3_64_intdigest(chunk) != self.chunk_digests[index]:
            raise WeightsError(f"chunk {index} of {self.name} is damaged: its checksum differs")
        return chunk

    def check_whole(self, payload: Payload) -> Payload:
        """``payload`` if it is the one that was published; ``WeightsError`` otherwise."""
        if len(payload) != self.num_bytes or xxhash.xxh3_128_hexdigest(payload) != self.digest:
            raise WeightsError(f"{self.name} is damaged: its checksum differs")
        if self.blake2b and _blake2b(payload) != self.blake2b:
            raise WeightsError(f"{self.name} is not what was signed")
        return payload


def _blake2b(payload: Payload) -> str:
    return hashlib.blake2b(payload, digest_size=32).hexdigest()


def cut(payload: Payload) -> list[memoryview]:
    """``payload`` in pieces of 2 MB, without copying."""
    view = memoryview(payload)
    return [view[first : first + CHUNK_BYTES] for first in range(0, len(payload), CHUNK_BYTES)]
