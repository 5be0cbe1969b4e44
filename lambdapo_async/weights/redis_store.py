"""The weight versions of a run: a list of files in Redis, and a head that only moves to whole versions."""

import time
import uuid
from collections.abc import Sequence

import redis

from lambdapo_async.broker.client import Broker
from lambdapo_async.broker.descriptors import read_entries
from lambdapo_async.broker.replies import as_bytes, as_fields, as_names, as_number, as_text, exactly
from lambdapo_async.broker.script import Script
from lambdapo_async.config.weights import REDIS, WeightsConfig
from lambdapo_async.errors import WeightsError, WeightsGoneError, WeightsLostError
from lambdapo_async.keys import RunKeys
from lambdapo_async.seal import Seal
from lambdapo_async.weights.catch_up import Available
from lambdapo_async.weights.fsspec_store import FsspecFiles, delete_file, read_file
from lambdapo_async.weights.manifest import (
    Manifest,
    NewFile,
    base_of,
    check_version,
    name_of,
    pack_available,
    unpack_available,
)
from lambdapo_async.weights.redis_chunks import RedisChunks
from lambdapo_async.weights.retention import Retention
from lambdapo_async.weights.tensor_file import Payload

READER_LEASE_S = 30.0
"""Seconds that a file stays for a reader who has gone silent."""
_LOG_ENTRIES = 16


class RedisWeightStore:
    """Publishes, follows and fetches (see ``interface.WeightStore``).

    A file is first *begun* (its manifest is noted, so that a crash leaves nothing that nobody would delete), then
    written, and *listed* in the same moment in which the head moves. It goes in the opposite order: off the list,
    and deleted once no reader holds it.

    Args:
        broker: the run's Redis.
        keys: of the run.
        config: where new files go and how much may stay; readers find out by themselves.
        seal: signs manifests, and through them every byte of their files.
    """

    def __init__(self, broker: Broker, keys: RunKeys, config: WeightsConfig, seal: Seal) -> None:
        self._broker, self._keys, self._seal = broker, keys, seal
        self._chunks = RedisChunks(broker, keys)
        self._target = self._chunks if config.store == REDIS else FsspecFiles(config.store, keys.run_id)
        self._retention = Retention(max_bytes=config.budget_bytes, grace_s=config.grace_s)
        self._begin = Script(broker, "weights_begin", fenced=True)
        self._flip = Script(broker, "weights_flip", fenced=True)
        self._retire = Script(broker, "weights_retire", fenced=True)
        self._forget = Script(broker, "weights_forget", fenced=True)
        self._hold = Script(broker, "weights_reader")

    def publish(self, version: int, files: Sequence[NewFile], *, consumed: int, fence: int) -> None:
        """Make room, then write the files' bytes, list them and move the head: readers see all of it or nothing.

        Raises:
            WeightsError: ``version`` is not above the head, a file leads elsewhere, or the byte budget is too small.
            LostDataError: the version that the files lead from is not the head any more, or the server restarted.
            FencedError: another learner owns the run.
        """
        check_version(version, files)
        keys = self._keys
        self._make_room(sum(len(file.payload) for file in files), fence=fence)
        manifests = [self._target.manifest(file, fence=fence).signed_for(file, self._seal) for file in files]
        packed = [part for manifest in manifests for part in (manifest.name, manifest.pack(self._seal))]
        begun = self._begin([keys.state, keys.weights_head, keys.weights_begun], [fence, version, *packed])
        _check_newer(version, begun)
        for manifest, file in zip(manifests, files, strict=True):
            self._target.put(manifest, file.payload, fence=fence)
        listed = [part for file in files for part in (name_of(file.available), pack_available(file.available))]
        pieces = [name for manifest in manifests for name in self._chunks.names(manifest)]
        flipped = self._flip(
            [keys.state, keys.weights_head, keys.weights_log, keys.weights_files, keys.weights_begun, *pieces],
            [fence, version, consumed, _LOG_ENTRIES, "" if (base := base_of(files)) is None else base, *listed],
        )
        _check_newer(version, flipped)

    def head(self) -> int | None:
        """Newest whole version; None before the first."""
        head = self._broker.call(lambda client: client.get(self._keys.weights_head))
        return None if head is None else as_number(head, "newest weight version")

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

    def files(self) -> tuple[Available, ...]:
        """Every file that can be fetched now, by version."""
        listed = as_fields(self._broker.call(lambda client: client.hgetall(self._keys.weights_files)))
        return tuple(sorted(map(unpack_available, listed.values()), key=lambda file: (file.version, name_of(file))))

    def lost(self) -> tuple[Available, ...]:
        """Those of :meth:`files` whose manifest or pieces are gone; two round trips.

        What lies elsewhere is not looked at. To be asked by the publisher, while it publishes nothing.
        """
        files, begun_key = self.files(), self._keys.weights_begun
        pieces = [self._chunks.names_of(file) if self._target is self._chunks else [] for file in files]

        def look(client: redis.Redis) -> object:
            pipeline = client.pipeline(transaction=False)
            pipeline.hkeys(begun_key)
            for names in pieces:
                pipeline.exists(begun_key, *names)
            return pipeline.execute()

        begun, *found = exactly(self._broker.call(look), 1 + len(files))
        described = set(as_names(begun))
        return tuple(
            file
            for file, names, count in zip(files, pieces, found, strict=True)
            if as_number(count, "pieces") <= len(names) or name_of(file) not in described
        )

    def fetch(self, file: Available) -> Payload:
        """The file as it was published, verified; while it is fetched it is not deleted.

        Raises:
            WeightsGoneError: it is not there any more.
            WeightsLostError: it is on the list, and Redis lost a part of it.
            WeightsError: it is damaged.
        """
        name, reader = name_of(file), uuid.uuid4().hex
        self._keep(name, reader)
        try:
            manifest = self._manifest(name)
            read = self._chunks.read if manifest.url is None else read_file
            return manifest.check_whole(read(manifest, lambda: self._keep(name, reader)))
        finally:
            self._broker.call(lambda client: client.zrem(self._keys.weights_readers, f"{name}|{reader}"))

    def _keep(self, name: str, reader: str) -> None:
        milliseconds = int(READER_LEASE_S * 1000)
        reply = self._hold([self._keys.weights_readers], [name, reader, milliseconds, self._keys.weights_files])
        (kept,) = exactly(reply, 1)
        if not as_number(kept, "hold"):
            raise WeightsGoneError(f"{name} is gone: the head is {self.head()}")

    def _manifest(self, name: str) -> Manifest:
        packed = self._broker.call(lambda client: client.hget(self._keys.weights_begun, name))
        if not isinstance(packed, bytes):
            raise WeightsLostError(f"{name} has no manifest: this Redis lost it")
        return Manifest.unpack(packed, name=name, seal=self._seal)

    def _make_room(self, incoming_bytes: int, *, fence: int) -> None:
        """Take files off the list, those first that lost a part; then delete what is on no list and nobody reads.

        That includes a crash's leftovers.
        """
        keys = self._keys
        lost = self.lost()
        whole = [file for file in self.files() if file not in lost]
        dropped = map(name_of, (*lost, *self._retention.to_drop(whole, incoming_bytes=incoming_bytes)))
        reply = self._retire(
            [keys.state, keys.weights_files, keys.weights_begun, keys.weights_readers], [fence, *dropped]
        )
        for name, packed in zip(reply[1::2], exactly(reply[2::2], len(reply[1::2])), strict=True):
            manifest = Manifest.unpack(as_bytes(packed), name=as_text(name), seal=self._seal)
            if manifest.url is not None:
                delete_file(manifest)
            self._forget([keys.state, keys.weights_begun, *self._chunks.names(manifest)], [fence, manifest.name])

    def _last_log_entry(self) -> bytes:
        newest = read_entries(self._broker.call(lambda client: client.xrevrange(self._keys.weights_log, count=1)))
        return newest[0][0] if newest else b"0-0"

    def _wait_for_log(self, after: bytes, block_s: float) -> None:
        block_ms = max(1, int(1000 * block_s))
        self._broker.call(lambda client: client.xread({self._keys.weights_log: after}, count=1, block=block_ms))


def _check_newer(version: int, reply: Sequence[object]) -> None:
    match reply:
        case [b"OLD", head]:
            raise WeightsError(f"version {version} is not above the head {as_text(head)}: numbers are never used twice")
