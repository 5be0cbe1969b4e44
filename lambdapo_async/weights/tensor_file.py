"""One safetensors file as bits: header, metadata and flat arrays, each way, with everything checked.

Layout (any safetensors reader opens it): uint64 little-endian header length, JSON header, tensor data. On the wire and
in a store the whole file is one zstd frame, recognised by its magic.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Annotated, TypeAlias

import numpy as np
import zstandard
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, TypeAdapter

from lambdapo_async.errors import WeightsError

MAX_HEADER_BYTES = 64 * 2**20
"""A header larger than this is an attack or damage: 100,000 tensors need about 12 MiB."""
BITS: Mapping[str, np.dtype[np.integer]] = {
    "U8": np.dtype("<u1"),
    "I8": np.dtype("<i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<u2"),
    "F32": np.dtype("<u4"),
}
"""How the bits of each safetensors type are held: floating point as unsigned patterns, so -0.0 and NaN are ordinary."""

Payload: TypeAlias = bytes | bytearray
"""One whole file, as it was fetched."""

_ZSTD_MAGIC = zstandard.FRAME_HEADER
# Level 1 with hardly a place to remember what was seen: what repeats in weights, gaps and steps repeats by chance, and
# pointing to it costs more than saying it again. Measured on deltas: 1 to 6 % smaller than plain level 1, and a third
# faster both ways; higher levels save no more and take many times as long.
_ZSTD = zstandard.ZstdCompressionParameters.from_level(1, hash_log=6, min_match=7, write_checksum=True)
_METADATA = TypeAdapter(dict[str, str])


@dataclass(frozen=True, slots=True, eq=False)
class BitTensor:
    """One tensor as it lies in a safetensors file."""

    dtype: str
    """safetensors' name of the type, a key of ``BITS``."""
    shape: tuple[int, ...]
    bits: NDArray[np.integer]
    """[numel] of ``BITS[dtype]``, row-major."""

    def copy(self) -> "BitTensor":
        """The same bits in memory of its own, writable."""
        return BitTensor(self.dtype, self.shape, self.bits.copy())

    def is_like(self, other: "BitTensor") -> bool:
        """Whether type and shape agree."""
        return (self.dtype, self.shape) == (other.dtype, other.shape)


class _Entry(BaseModel):
    """One tensor of a header."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    dtype: str
    shape: Annotated[list[NonNegativeInt], Field(max_length=8)]
    data_offsets: Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)]
    """[begin, end) in bytes, from the end of the header."""


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A file's tensors and metadata."""

    tensors: Mapping[str, BitTensor]
    metadata: Mapping[str, str]

    def to_bytes(self) -> bytes:
        """The plain safetensors file; wide types first, so that every tensor is aligned and like lies beside like."""
        names = sorted(
            self.tensors, key=lambda name: (-BITS[self.tensors[name].dtype].itemsize, self._type(name), name)
        )
        header: dict[str, object] = {"__metadata__": dict(self.metadata)}
        end = 0
        for name in names:
            tensor = self.tensors[name]
            begin, end = end, end + tensor.bits.nbytes
            header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (begin, end)}
        head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        head += b" " * (-len(head) % 8)
        return b"".join([len(head).to_bytes(8, "little"), head, *(self.tensors[name].bits.data for name in names)])

    def _type(self, name: str) -> str:
        return self.tensors[name].dtype


def compress(payload: bytes) -> bytes:
    """``payload`` as one zstd frame that carries its length and checksum."""
    return zstandard.ZstdCompressor(compression_params=_ZSTD).compress(payload)


def read_tensor_file(payload: Payload, *, max_bytes: int) -> TensorFile:
    """Parse and validate a file, compressed or plain; its tensors are read-only views of the decompressed bytes.

    Args:
        payload: one whole file.
        max_bytes: largest size it may have when decompressed.

    Raises:
        WeightsError: it is not one whole safetensors file of known types, or larger than ``max_bytes``.
    """
    plain = _decompressed(payload, max_bytes) if payload.startswith(_ZSTD_MAGIC) else payload
    if len(plain) > max_bytes:
        raise WeightsError(f"the file has {len(plain)} bytes, at most {max_bytes} were expected")
    length = int.from_bytes(plain[:8], "little")
    if len(plain) < 8 or length > min(MAX_HEADER_BYTES, len(plain) - 8):
        raise WeightsError(f"{len(plain)} bytes cannot hold a safetensors header of {length}")
    try:
        fields = json.loads(plain[8 : 8 + length], object_pairs_hook=_distinct)
        if not isinstance(fields, dict):
            raise WeightsError("the safetensors header is not a JSON object")
        metadata = _METADATA.validate_python(fields.pop("__metadata__", {}), strict=True)
        entries = {name: _Entry.model_validate(entry) for name, entry in fields.items()}
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"not a safetensors header: {error!s:.200}") from error
    _check_extents(entries, num_bytes=len(plain) - 8 - length)
    return TensorFile({name: _view(plain, 8 + length, entry) for name, entry in entries.items()}, metadata)


def _decompressed(payload: Payload, max_bytes: int) -> bytes:
    """The bytes of one zstd frame whose declared length is acceptable, before anything is allocated."""
    try:
        num_bytes = zstandard.get_frame_parameters(payload).content_size
        if num_bytes > max_bytes:
            raise WeightsError(f"the file decompresses to {num_bytes} bytes, at most {max_bytes} were expected")
        plain = zstandard.ZstdDecompressor().decompress(payload, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise WeightsError(f"{len(payload)} bytes are not one whole zstd frame: {error}") from error
    if len(plain) != num_bytes:
        raise WeightsError(f"the file decompresses to {len(plain)} bytes and declares {num_bytes}")
    return plain


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise WeightsError("the safetensors header names something twice")
    return fields


def _check_extents(entries: Mapping[str, _Entry], *, num_bytes: int) -> None:
    """Every tensor lies inside the file, and no byte belongs to none or to two."""
    for name, entry in entries.items():
        begin, end = entry.data_offsets
        if entry.dtype not in BITS:
            raise WeightsError(f"{name!r:.200} has type {entry.dtype!r:.50}, none of {sorted(BITS)}")
        expected = prod(entry.shape) * BITS[entry.dtype].itemsize
        if end - begin != expected:
            raise WeightsError(f"{name!r:.200} {entry.shape} takes {expected} bytes, the file gives {end - begin}")
    extents = sorted((entry.data_offsets[0], entry.data_offsets[1]) for entry in entries.values())
    borders = [(0, 0), *extents, (num_bytes, num_bytes)]
    if any(left[1] != right[0] for left, right in pairwise(borders)):
        raise WeightsError(f"the tensors do not cover the {num_bytes} data bytes exactly once")


def _view(plain: Payload, data_start: int, entry: _Entry) -> BitTensor:
    begin, end = entry.data_offsets
    dtype = BITS[entry.dtype]
    bits = np.frombuffer(plain, dtype, count=(end - begin) // dtype.itemsize, offset=data_start + begin)
    return BitTensor(entry.dtype, tuple(entry.shape), bits)
