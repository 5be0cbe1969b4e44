"""The learner's end of the rollout queue over Redis: descriptors in a stream, payloads beside it.

Entries stay until they are committed; a restarted learner reads them again from the start.
"""

import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence

import redis

from lambdapo_async.broker.client import Broker
from lambdapo_async.broker.interface import Delivery, Descriptor, Durable, QueueStats, RunLimits
from lambdapo_async.broker.ownership import Ownership
from lambdapo_async.broker.script import Script, fence_error
from lambdapo_async.errors import BrokerError, LostDataError, WireFormatError
from lambdapo_async.keys import RunKeys
from lambdapo_async.rollout import Lease

StreamEntry = tuple[bytes, dict[bytes, bytes]]
_Removal = tuple[bytes, str, int, bool]
"""Stream id, producer, sequence number, and whether the group was received before under another number."""

MAX_QUARANTINED = 256
"""Quarantined groups kept; older ones go, the count stays."""
MAX_QUARANTINED_BYTES = 1024**2
"""Kept of each payload, from its beginning."""
_FETCH_BYTES = 16 * 1024**2  # one pipeline's replies: well below the server's output buffer limit of 64 MB
_REMOVED_AT_ONCE = 512
_SCANNED_AT_ONCE = 1024
_FROM_THE_START = b"0-0"


class RedisRolloutSource:
    """The learner's end (see ``interface.RolloutSource``). One thread reads; the other calls may come from any."""

    def __init__(self, broker: Broker, keys: RunKeys, ownership: Ownership, fence: int, limits: RunLimits) -> None:
        self._broker, self._keys, self._ownership = broker, keys, ownership
        self._fence, self._limits = fence, limits
        self._raise_marks = Script(broker, "raise_marks", fenced=True)
        self._remove = Script(broker, "remove", fenced=True)
        self._recount = Script(broker, "recount", fenced=True)
        self._consumed = Script(broker, "consumed", fenced=True)
        self._quarantine = Script(broker, "quarantine", fenced=True)
        self._request = Script(broker, "request_heldout", fenced=True)
        self._cursor = _FROM_THE_START
        self._received: dict[str, int] = {}
        self._uncommitted: dict[tuple[str, int], bytes] = {}
        self._lock = threading.Lock()

    def initialise(self, durable: Durable) -> None:
        """Make Redis agree with ``durable``. Every step may be repeated: a crash in between is healed by the next."""
        keys, limits, watermarks = self._keys, self._limits, durable.watermarks
        fields = {
            "capacity": limits.capacity,
            "max_groups": limits.max_groups,
            "max_bytes": limits.max_bytes,
            "lease_ms": int(limits.lease_s * 1000),
        }
        self._ownership.take_over(self._fence, fields)
        marks = [argument for pair in watermarks.items() for argument in pair]
        self._raise_marks([keys.state, keys.accepted, keys.committed], [self._fence, *marks])
        durable_entries = [
            (entry_id, descriptor.producer, descriptor.seq, False)
            for entry_id, descriptor in self._scan()
            if descriptor.seq <= watermarks.get(descriptor.producer, 0)
        ]
        self._delete(durable_entries)
        self._recount(
            [keys.state, keys.queue, keys.leases, keys.holders, keys.todo, keys.heldout, keys.answered],
            [self._fence, durable.consumed, durable.waiting, durable.next_index, *durable.holes],
        )
        with self._lock:
            self._cursor = _FROM_THE_START
            self._received = dict(watermarks)
            self._uncommitted = {}

    def read(self, max_groups: int, *, timeout_s: float) -> list[Delivery]:
        """Groups not read before, oldest first.

        Raises:
            FencedError: another learner came.
            LostDataError: a number or a payload is missing.
        """
        entries = self._wait_for_entries(max_groups, timeout_s)
        descriptors = [_descriptor(fields) for _, fields in entries]
        payloads = self._payloads(descriptors)
        # Before anything is believed missing: a new learner deletes what its checkpoint holds.
        self._check_fence(self._broker.call(lambda client: client.hget(self._keys.state, "fence")))
        self._check_consecutive(descriptors)
        deliveries = [_delivery(*pair) for pair in zip(descriptors, payloads, strict=True)]
        with self._lock:
            for (entry_id, _), descriptor in zip(entries, descriptors, strict=True):
                self._uncommitted[descriptor.producer, descriptor.seq] = entry_id
                self._received[descriptor.producer] = descriptor.seq
                self._cursor = entry_id
        return deliveries

    def release(self, consumed: int) -> None:
        """Raise the consumed count, so that the gate opens for groups that were discarded."""
        self._consumed([self._keys.state], [self._fence, consumed])

    def commit(self, watermarks: Mapping[str, int], *, duplicates: Collection[tuple[str, int]] = ()) -> None:
        """Delete everything up to the marks: it is durable at the learner. Idempotent."""
        keys = self._keys
        marks = [argument for pair in watermarks.items() for argument in pair]
        self._raise_marks([keys.state, keys.accepted, keys.committed], [self._fence, *marks])
        with self._lock:
            durable = [
                (entry_id, producer, seq, (producer, seq) in duplicates)
                for (producer, seq), entry_id in self._uncommitted.items()
                if seq <= watermarks.get(producer, 0)
            ]
        self._delete(durable)
        with self._lock:
            for _, producer, seq, _ in durable:
                self._uncommitted.pop((producer, seq), None)

    def quarantine(self, descriptor: Descriptor, payload: bytes, reason: str) -> None:
        """Keep the first MB of an unreadable group aside, with its true size (the newest 256; all are counted)."""
        kept = payload[:MAX_QUARANTINED_BYTES]
        self._quarantine(
            [self._keys.state, self._keys.dead],
            [self._fence, descriptor.producer, descriptor.seq, reason, kept, len(payload), MAX_QUARANTINED],
        )

    def request_evaluation(self, leases: Sequence[Lease]) -> None:
        """Offer held-out leases to the actors, ahead of training ones."""
        keys = self._keys
        self._request(
            [keys.state, keys.heldout, keys.leases, keys.answered], [self._fence, *(lease.id for lease in leases)]
        )

    def stats(self) -> QueueStats:
        """Depths right now."""
        keys = self._keys

        def look(client: redis.Redis) -> object:
            pipeline = client.pipeline(transaction=True)
            pipeline.hmget(keys.state, ["fence", "bytes", "admitted", "consumed", "quarantined"])
            pipeline.xlen(keys.queue)
            pipeline.zcard(keys.leases)
            pipeline.llen(keys.todo)
            return pipeline.execute()

        (fence, *counters), queued, leased, returned = self._broker.call(look)
        self._check_fence(fence)
        num_bytes, admitted, consumed, quarantined = (int(value or 0) for value in counters)
        return QueueStats(queued, num_bytes, leased, returned, admitted - consumed, quarantined)

    def _wait_for_entries(self, max_groups: int, timeout_s: float) -> list[StreamEntry]:
        deadline = time.monotonic() + timeout_s
        while True:
            block_s = min(max(deadline - time.monotonic(), 0.001), self._broker.longest_block_s)
            entries = self._read_stream(max_groups, block_ms=max(1, int(block_s * 1000)))
            if entries or time.monotonic() >= deadline:
                return entries

    def _read_stream(self, count: int, *, block_ms: int) -> list[StreamEntry]:
        reply = self._broker.call(
            lambda client: client.xread({self._keys.queue: self._cursor}, count=count, block=block_ms)
        )
        return reply[0][1] if reply else []

    def _scan(self) -> Iterator[tuple[bytes, Descriptor]]:
        """Every entry of the stream with its id."""
        entries = self._range(b"-")
        while entries:
            for entry_id, fields in entries:
                yield entry_id, _descriptor(fields)
            entries = self._range(b"(" + entries[-1][0])

    def _range(self, start: bytes) -> list[StreamEntry]:
        entries: list[StreamEntry] = self._broker.call(
            lambda client: client.xrange(self._keys.queue, start, "+", count=_SCANNED_AT_ONCE)
        )
        return entries

    def _delete(self, entries: Sequence[_Removal]) -> None:
        for first in range(0, len(entries), _REMOVED_AT_ONCE):
            batch = entries[first : first + _REMOVED_AT_ONCE]
            payloads = [self._keys.payload(producer, seq) for _, producer, seq, _ in batch]
            flags = [argument for entry_id, _, _, is_duplicate in batch for argument in (entry_id, int(is_duplicate))]
            self._remove([self._keys.state, self._keys.queue, *payloads], [self._fence, *flags])

    def _payloads(self, descriptors: Sequence[Descriptor]) -> list[bytes | None]:
        """The payloads, fetched in batches of bounded size; None where one is missing."""
        payloads: list[bytes | None] = []
        for batch in _by_bytes(descriptors):
            payloads += self._get([self._keys.payload(descriptor.producer, descriptor.seq) for descriptor in batch])
        return payloads

    def _get(self, names: Sequence[bytes]) -> list[bytes | None]:
        values: list[bytes | None] = self._broker.call(lambda client: client.mget(names))
        return values

    def _check_consecutive(self, descriptors: Sequence[Descriptor]) -> None:
        received = dict(self._received)
        for descriptor in descriptors:
            last = received.get(descriptor.producer, 0)
            if descriptor.seq != last + 1:
                raise LostDataError(f"group {descriptor.seq} of {descriptor.producer} follows {last}: Redis lost data")
            received[descriptor.producer] = descriptor.seq

    def _check_fence(self, stored: bytes | None) -> None:
        if stored is None:
            raise fence_error([])
        if int(stored) != self._fence:
            raise fence_error([stored])


def _descriptor(fields: Mapping[bytes, bytes]) -> Descriptor:
    try:
        return Descriptor(
            producer=fields[b"p"].decode(),
            seq=int(fields[b"s"]),
            lease=Lease.from_id(fields[b"l"].decode()),
            min_version=int(fields[b"v"]),
            num_bytes=int(fields[b"n"]),
            mean_reward=float(fields[b"r"]),
        )
    except (KeyError, ValueError, WireFormatError) as error:
        raise BrokerError(f"an entry of the rollout queue is no descriptor: {dict(fields)!r:.200}") from error


def _delivery(descriptor: Descriptor, payload: bytes | None) -> Delivery:
    if payload is None:
        raise LostDataError(f"the payload of group {descriptor.seq} of {descriptor.producer} is gone: Redis lost data")
    return Delivery(descriptor, payload)


def _by_bytes(descriptors: Sequence[Descriptor]) -> Iterator[list[Descriptor]]:
    """Consecutive batches of at most 16 MB (or one group, when that is larger)."""
    batch: list[Descriptor] = []
    size = 0
    for descriptor in descriptors:
        if batch and size + descriptor.num_bytes > _FETCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(descriptor)
        size += descriptor.num_bytes
    if batch:
        yield batch
