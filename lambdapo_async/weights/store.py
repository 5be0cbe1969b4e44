"""Weight versions in Redis: pieces of 2 MB, a manifest, and a head that only moves to whole versions."""

import time
import uuid
from collections.abc import Sequence
from itertools import islice

import msgpack
import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from lambdapo_async.broker.client import Broker
from lambdapo_async.broker.script import Script, as_text
from lambdapo_async.errors import WeightsError
from lambdapo_async.keys import RunKeys

CHUNK_BYTES = 2 * 1024**2
"""Measured: 64 MB pieces cost a third of the reading speed and stall the rollout queue for 460 ms."""
KEPT_VERSIONS = 2
"""Newest versions that are never deleted."""
READER_LEASE_S = 30.0
"""Seconds that a version stays for a reader who has gone silent."""
_LOG_ENTRIES = 16
_CHUNKS_AT_ONCE = 8  # 16 MB of replies: below the server's output buffer limit


class Manifest(BaseModel):
    """Sizes and checksums of one version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int
    num_bytes: int
    chunk_bytes: tuple[int, ...]
    chunk_digests: tuple[int, ...]
    """xxh3_64 of each chunk."""
    digest: str
    """xxh3_128 of the whole payload in hexadecimal."""

    @classmethod
    def of(cls, version: int, payload: bytes) -> "Manifest":
        """Measure ``payload``."""
        chunks = cut(payload)
        return cls(
            version=version,
            num_bytes=len(payload),
            chunk_bytes=tuple(len(chunk) for chunk in chunks),
            chunk_digests=tuple(xxhash.xxh3_64_intdigest(chunk) for chunk in chunks),
            digest=xxhash.xxh3_128_hexdigest(payload),
        )

    def check_chunk(self, index: int, chunk: bytes | None) -> bytes:
        """``chunk`` if it is the one that was published; ``WeightsError`` otherwise."""
        if chunk is None:
            raise WeightsError(f"chunk {index} of version {self.version} is gone")
        if len(chunk) != self.chunk_bytes[index] or xxhash.xxh3_64_intdigest(chunk) != self.chunk_digests[index]:
            raise WeightsError(f"chunk {index} of version {self.version} is damaged: its checksum differs")
        return chunk

    def check_whole(self, payload: bytes) -> bytes:
        """``payload`` if it is the one that was published; ``WeightsError`` otherwise."""
        if len(payload) != self.num_bytes or xxhash.xxh3_128_hexdigest(payload) != self.digest:
            raise WeightsError(f"version {self.version} is damaged: its checksum differs")
        return payload


class RedisWeightStore:
    """Publishes, follows and fetches (see ``interface.WeightStore``)."""

    def __init__(self, broker: Broker, keys: RunKeys) -> None:
        self._broker, self._keys = broker, keys
        self._begin = Script(broker, "weights_begin", fenced=True)
        self._put = Script(broker, "weights_put", fenced=True)
        self._flip = Script(broker, "weights_flip", fenced=True)
        self._condemn = Script(broker, "weights_condemn", fenced=True)
        self._forget = Script(broker, "weights_forget", fenced=True)
        self._hold = Script(broker, "weights_reader")

    def publish(self, version: int, payload: bytes, *, consumed: int, fence: int) -> None:
        """Chunks, manifest, head, notification, in this order; old versions nobody reads are deleted.

        Raises:
            WeightsError: ``version`` is not above the head, or ``payload`` is empty.
            FencedError: another learner owns the run.
        """
        if not payload:
            raise WeightsError(f"version {version} is empty")
        keys, manifest, chunks = self._keys, Manifest.of(version, payload), cut(payload)
        begun = self._begin([keys.state, keys.weights_head, keys.weights_versions], [fence, version, len(chunks)])
        _check_newer(version, begun)
        for index, chunk in enumerate(chunks):
            self._put([keys.state, keys.weights_chunk(version, index)], [fence, chunk])
        self._put([keys.state, keys.weights_manifest(version)], [fence, msgpack.packb(manifest.model_dump())])
        flipped = self._flip(
            [keys.state, keys.weights_head, keys.weights_log], [fence, version, consumed, _LOG_ENTRIES]
        )
        _check_newer(version, flipped)
        self._delete_old(fence)

    def head(self) -> int | None:
        """Newest whole version; None before the first."""
        head = self._broker.call(lambda client: client.get(self._keys.weights_head))
        return None if head is None else int(head)

    def wait_newer(self, than: int, *, timeout_s: float) -> int | None:
        """The head as soon as it is above ``than``; None after ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        while True:
            # The log's end is read before the head: a version that comes in between is seen by one of the two.
            last_entry = self._last_log_entry()
            head = self.head()
            if head is not None and head > than:
                return head
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return None
            self._wait_for_log(last_entry, min(left_s, self._broker.longest_block_s))

    def fetch(self, version: int) -> bytes:
        """A version's bytes, every chunk verified; while they are fetched the version is not deleted.

        Raises:
            WeightsError: it is gone or damaged.
        """
        reader = uuid.uuid4().hex
        self._keep(version, reader)
        try:
            manifest = self._manifest(version)
            indices, chunks = iter(range(len(manifest.chunk_bytes))), list[bytes]()
            while batch := list(islice(indices, _CHUNKS_AT_ONCE)):
                self._keep(version, reader)
                chunks += self._chunks(manifest, batch)
            return manifest.check_whole(b"".join(chunks))
        finally:
            member = f"{version}|{reader}"
            self._broker.call(lambda client: client.zrem(self._keys.weights_readers, member))

    def _keep(self, version: int, reader: str) -> None:
        keys = [self._keys.weights_versions, self._keys.weights_readers]
        (kept,) = self._hold(keys, [version, reader, int(READER_LEASE_S * 1000)])
        if not kept:
            raise WeightsError(f"version {version} is gone: the head is {self.head()}")

    def _manifest(self, version: int) -> Manifest:
        packed = self._broker.call(lambda client: client.get(self._keys.weights_manifest(version)))
        if not isinstance(packed, bytes):
            raise WeightsError(f"version {version} has no manifest: it was never published whole")
        try:
            manifest = Manifest.model_validate(msgpack.unpackb(packed))
        except (ValueError, ValidationError, msgpack.UnpackException) as error:
            raise WeightsError(f"the manifest of version {version} is damaged: {error}") from error
        if manifest.version != version or len(manifest.chunk_digests) != len(manifest.chunk_bytes):
            raise WeightsError(f"the manifest of version {version} is damaged: it describes {manifest.version}")
        return manifest

    def _chunks(self, manifest: Manifest, indices: Sequence[int]) -> list[bytes]:
        names = [self._keys.weights_chunk(manifest.version, index) for index in indices]
        found = self._broker.call(lambda client: client.mget(names))
        return [manifest.check_chunk(index, chunk) for index, chunk in zip(indices, found, strict=True)]

    def _delete_old(self, fence: int) -> None:
        """Close versions to new readers first, then delete them: none vanishes under a reader's hands."""
        keys = self._keys
        _, *closed = self._condemn([keys.state, keys.weights_versions, keys.weights_readers], [fence, KEPT_VERSIONS])
        for version, num_chunks in zip(closed[::2], closed[1::2], strict=True):
            number = int(version)
            pieces = [keys.weights_chunk(number, index) for index in range(int(num_chunks))]
            self._forget([keys.state, keys.weights_versions, keys.weights_manifest(number), *pieces], [fence, number])

    def _last_log_entry(self) -> bytes:
        newest: list[tuple[bytes, dict[bytes, bytes]]] = self._broker.call(
            lambda client: client.xrevrange(self._keys.weights_log, count=1)
        )
        return newest[0][0] if newest else b"0-0"

    def _wait_for_log(self, after: bytes, block_s: float) -> None:
        block_ms = max(1, int(1000 * block_s))
        self._broker.call(lambda client: client.xread({self._keys.weights_log: after}, count=1, block=block_ms))


def cut(payload: bytes) -> list[memoryview]:
    """``payload`` in pieces of 2 MB, without copying."""
    view = memoryview(payload)
    return [view[first : first + CHUNK_BYTES] for first in range(0, len(payload), CHUNK_BYTES)]


def _check_newer(version: int, reply: Sequence[bytes | int]) -> None:
    if reply[0] == b"OLD":
        raise WeightsError(f"version {version} is not above the head {as_text(reply[1])}: numbers are never used twice")
