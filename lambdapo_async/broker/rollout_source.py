"""The learner's end of the rollout queue over Redis: descriptors in a stream, payloads beside it.

Entries stay until they are committed; after ``initialise`` they are read again from the start.
"""

import logging
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence

import redis

from lambdapo_async.broker.client import Broker
from lambdapo_async.broker.descriptors import StreamEntry, read_descriptor, read_entries, read_name
from lambdapo_async.broker.interface import Delivery, Descriptor, Durable, QueueStats
from lambdapo_async.broker.limits import RunLimits
from lambdapo_async.broker.ownership import Ownership
from lambdapo_async.broker.replies import as_number, as_values, exactly
from lambdapo_async.broker.round_trip import Argument
from lambdapo_async.broker.script import Script, fence_error
from lambdapo_async.broker.settlement import Settlement
from lambdapo_async.errors import BrokerError, LostDataError, WireFormatError
from lambdapo_async.keys import RunKeys
from lambdapo_async.rollout import Lease

logger = logging.getLogger(__name__)

MAX_QUARANTINED = 256
"""Quarantined groups kept; older ones go, the count stays."""
MAX_QUARANTINED_BYTES = 16 * 1024
"""Kept of each payload, from its beginning: lease, actor, timing, prompt and lengths. All of them are 4 MB, for which
``maxmemory`` has room beside the queue (see doctor)."""
_MAX_NAME_BYTES = 1024  # of a producer and of a reason, which may quote what was sent
_FETCH_BYTES = 4 * 1024**2  # of one reply: larger ones cost Redis more memory and no less time
_REMOVED_AT_ONCE = 512
_GATHERED_S = 0.002
"""A read costs learner and server what several small groups do: those of so short a time are read together."""
_FROM_THE_START = b"0-0"
_COUNTERS = ("bytes", "admitted", "consumed", "quarantined", "full", "late", "expired")


class RedisRolloutSource:
    """The learner's end (see ``interface.RolloutSource``). One thread reads; the other calls may come from any."""

    def __init__(self, broker: Broker, keys: RunKeys, ownership: Ownership, fence: int, limits: RunLimits) -> None:
        self._broker, self._keys, self._fence = broker, keys, fence
        self._settlement = Settlement(broker, keys, ownership, fence, limits)
        self._check = Script(broker, "check", synced=True)
        self._commit = Script(broker, "commit", synced=True)
        self._consumed = Script(broker, "consumed", fenced=True)
        self._quarantine = Script(broker, "quarantine", fenced=True)
        self._request = Script(broker, "request_heldout", fenced=True)
        self._synced = [
            keys.state, keys.queue, keys.accepted, keys.committed, keys.leases, keys.holders, keys.todo, keys.heldout,
        ]  # fmt: skip
        self._cursor, self._ticks = _FROM_THE_START, 0
        self._next_read = 0.0
        """``time.monotonic()`` before which the stream is left alone."""
        self._life = 0
        """Counts ``initialise``: what is read while it runs may be of a queue that is lost."""
        self._received: dict[str, int] = {}
        self._committed: dict[str, int] = {}
        self._uncommitted: dict[tuple[str, int], tuple[bytes, int]] = {}
        """Stream id and bytes of what was read."""
        self._lock = threading.Lock()

    def initialise(self, durable: Durable) -> None:
        """Make Redis agree with ``durable``. Every step may be repeated: a crash in between is healed by the next."""
        with self._lock:
            self._life += 1
        ticks = self._settlement.settle(durable)
        with self._lock:
            self._life += 1
            self._cursor, self._ticks = _FROM_THE_START, ticks
            self._received, self._committed = dict(durable.watermarks), dict(durable.watermarks)
            self._uncommitted = {}

    def read(self, max_groups: int, *, timeout_s: float) -> list[Delivery]:
        """Groups not read before, oldest first.

        An entry that is no descriptor is quarantined, and its number counts as received.

        Raises:
            FencedError: another learner came.
            LostDataError: Redis is not as ``initialise`` left it, or a number or a payload is missing.
        """
        life = self._life
        entries = self._wait_for_entries(max_groups, timeout_s)
        descriptors = [_described(fields) for _, fields in entries]
        payloads = iter(self._payloads([one for one in descriptors if one is not None]))
        received, names, deliveries = dict(self._received), dict[tuple[str, int], tuple[bytes, int]](), list[Delivery]()
        for (entry_id, fields), descriptor in zip(entries, descriptors, strict=True):
            if descriptor is None:
                producer, seq = self._set_entry_aside(fields)
            else:
                producer, seq = descriptor.producer, descriptor.seq
                deliveries.append(_delivery(descriptor, next(payloads)))
            if seq != received.get(producer, 0) + 1:
                raise LostDataError(f"group {seq} of {producer} follows {received.get(producer, 0)}: Redis lost data")
            received[producer] = seq
            names[producer, seq] = entry_id, 0 if descriptor is None else descriptor.num_bytes
        if entries:
            with self._lock:
                if self._life != life:
                    return []  # another queue's, whose numbers have other payloads by now; what is ours comes again
                self._cursor, self._received = entries[-1][0], received
                self._uncommitted |= names
        return deliveries

    def release(self, consumed: int) -> None:
        """Raise the consumed count, so that the gate opens for groups that were discarded."""
        self._consumed([self._keys.state], [self._fence, consumed])

    def commit(self, watermarks: Mapping[str, int], *, duplicates: Collection[tuple[str, int]] = ()) -> None:
        """Delete everything up to the marks, and tell the actors: it is durable at the learner. Idempotent."""
        with self._lock:
            raised = {name: mark for name, mark in watermarks.items() if mark > self._committed.get(name, 0)}
            durable = [one for one in self._uncommitted.items() if one[0][1] <= watermarks.get(one[0][0], 0)]
        # The marks go with the last batch: an actor forgets nothing that a reader could still find.
        last = max(0, len(durable) - 1) // _REMOVED_AT_ONCE * _REMOVED_AT_ONCE
        for first in range(0, last + 1, _REMOVED_AT_ONCE):
            batch = durable[first : first + _REMOVED_AT_ONCE]
            self._forget(batch, raised if first == last else {}, duplicates)
        with self._lock:
            self._committed |= raised
            for name, entry in durable:
                if self._uncommitted.get(name) == entry:
                    del self._uncommitted[name]

    def quarantine(self, descriptor: Descriptor, payload: bytes, reason: str) -> None:
        """Keep the first 16 KB of an unreadable group aside, with its true size (the newest 256; all are counted)."""
        self._set_aside(descriptor.producer, descriptor.seq, payload, reason)

    def request_evaluation(self, leases: Sequence[Lease]) -> None:
        """Offer held-out leases to the actors, ahead of training ones."""
        keys = self._keys
        self._request(
            [keys.state, keys.heldout, keys.leases, keys.answered], [self._fence, *(lease.id for lease in leases)]
        )

    def stats(self) -> QueueStats:
        """Depths right now, and what happened so far.

        Raises:
            FencedError: another learner came.
            LostDataError: the run is gone.
            BrokerError: a counter is damaged.
        """
        keys = self._keys

        def look(client: redis.Redis) -> object:
            pipeline = client.pipeline(transaction=True)
            pipeline.hmget(keys.state, ["fence", *_COUNTERS])
            pipeline.xlen(keys.queue)
            pipeline.zcard(keys.leases)
            pipeline.llen(keys.todo)
            return pipeline.execute()

        found, *sizes = self._broker.call(look)
        fence, *counters = exactly(found, 1 + len(_COUNTERS))
        queued, leased, returned = (as_number(size, "size") for size in sizes)
        self._check_fence(fence)
        num_bytes, admitted, consumed, *so_far = (
            as_number(value or 0, name) for name, value in zip(_COUNTERS, counters, strict=True)
        )
        return QueueStats(queued, num_bytes, leased, returned, admitted - consumed, *so_far)

    def _forget(
        self,
        groups: Sequence[tuple[tuple[str, int], tuple[bytes, int]]],
        marks: Mapping[str, int],
        duplicates: Collection[tuple[str, int]],
    ) -> None:
        entries: list[Argument] = []
        for name, (entry_id, num_bytes) in groups:
            entries += (entry_id, int(name in duplicates), num_bytes)
        reply = self._commit(
            [*self._synced, *(self._keys.payload(*name) for name, _ in groups)],
            [*self._known(), len(marks), *(argument for mark in marks.items() for argument in mark), *entries],
        )
        _, ticks = exactly(reply, 2)
        with self._lock:
            self._ticks = max(self._ticks, as_number(ticks, "ticks"))

    def _known(self) -> tuple[Argument, ...]:
        """What every synced script compares Redis with."""
        with self._lock:
            return self._fence, self._ticks, len(self._committed)

    def _set_aside(self, producer: str, seq: int, payload: bytes, reason: str) -> None:
        name, why = (text.encode(errors="replace")[:_MAX_NAME_BYTES] for text in (producer, reason))
        self._quarantine(
            [self._keys.state, self._keys.dead],
            [self._fence, name, seq, why, payload[:MAX_QUARANTINED_BYTES], len(payload), MAX_QUARANTINED],
        )

    def _set_entry_aside(self, fields: Mapping[bytes, bytes]) -> tuple[str, int]:
        """Quarantine an entry that is no descriptor; returns the number that it uses up."""
        name, shown = read_name(fields), repr(dict(fields))[:200]
        logger.warning("quarantined an entry of the rollout queue that is no descriptor: %s", shown)
        producer, seq = name or ("", 0)
        self._set_aside(producer, seq, repr(dict(fields)).encode(), "no descriptor")
        if name is None:
            raise LostDataError(f"an entry of the rollout queue names no group: {shown}")
        return name

    def _wait_for_entries(self, max_groups: int, timeout_s: float) -> list[StreamEntry]:
        deadline = time.monotonic() + timeout_s
        time.sleep(max(0.0, self._next_read - time.monotonic()))
        while True:
            block_s = min(max(deadline - time.monotonic(), 0.001), self._broker.longest_block_s)
            entries = self._read_stream(max_groups, block_ms=max(1, int(block_s * 1000)))
            now = time.monotonic()
            if entries or now >= deadline:
                self._next_read = now + (_GATHERED_S if len(entries) < max_groups else 0.0)
                return entries

    def _read_stream(self, count: int, *, block_ms: int) -> list[StreamEntry]:
        reply = self._broker.call(
            lambda client: client.xread({self._keys.queue: self._cursor}, count=count, block=block_ms)
        )
        match reply:
            case None | []:
                return []
            case [[_, entries]]:
                return read_entries(entries)
        raise BrokerError(f"Redis answered {reply!r:.200} to XREAD")

    def _payloads(self, descriptors: Sequence[Descriptor]) -> list[bytes | None]:
        """The payloads, None where one is missing; and the check that what was read can be believed.

        The check comes last: a new learner deletes what is durable, before anything is believed missing.
        """
        payloads: list[bytes | None] = []
        *batches, last = [*_by_bytes(descriptors)] or [[]]
        for batch in batches:
            payloads += self._get(batch)
        if not last:
            self._check(self._synced, self._known())
            return payloads
        names = [self._keys.payload(one.producer, one.seq) for one in last]
        (found,), _ = self._check.after([("MGET", *names)], self._synced, self._known())
        return [*payloads, *as_values(found, len(names))]

    def _get(self, descriptors: Sequence[Descriptor]) -> list[bytes | None]:
        names = [self._keys.payload(one.producer, one.seq) for one in descriptors]
        return as_values(self._broker.call(lambda client: client.mget(names)), len(names))

    def _check_fence(self, stored: object) -> None:
        fence = as_number(-1 if stored is None else stored, "fence")
        if fence != self._fence:
            raise fence_error([fence] if fence > self._fence else [])


def _described(fields: Mapping[bytes, bytes]) -> Descriptor | None:
    try:
        return read_descriptor(fields)
    except WireFormatError:
        return None


def _delivery(descriptor: Descriptor, payload: bytes | None) -> Delivery:
    if payload is None:
        raise LostDataError(f"the payload of group {descriptor.seq} of {descriptor.producer} is gone: Redis lost data")
    return Delivery(descriptor, payload)


def _by_bytes(descriptors: Sequence[Descriptor]) -> Iterator[list[Descriptor]]:
    """Consecutive batches of at most 4 MB (or one group, when that is larger)."""
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
