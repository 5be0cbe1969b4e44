"""The learner's end of the queue in memory."""

import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence

from lambdapo_async.broker.interface import Delivery, Descriptor, Durable, QueueStats
from lambdapo_async.broker.limits import RunLimits
from lambdapo_async.errors import LostDataError
from lambdapo_async.rollout import Lease
from tests.fakes_redis_run import POLL_S, FakeRedisRun


class FakeRolloutSource:
    """``interface.RolloutSource``"""

    def __init__(self, state: FakeRedisRun, owner: str, fence: int, limits: RunLimits) -> None:
        self._state, self._owner, self._fence, self._limits = state, owner, fence, limits
        self._received: dict[str, int] = {}
        self._ticks = 0

    def initialise(self, durable: Durable) -> None:
        state = self._state
        with state.lock:
            state.take_over(self._fence, self._owner)
            state.limits = self._limits
            self._sort_out(durable.watermarks)
            self._recount(durable)
            state.is_open = True
            state.ticks += 1
            self._ticks, self._received = state.ticks, dict(durable.watermarks)

    def _sort_out(self, watermarks: Mapping[str, int]) -> None:
        state, kept = self._state, list[Delivery]()
        accepted = dict.fromkeys(state.accepted, 0) | dict(watermarks)
        for one in state.queue:
            if one.descriptor.seq == accepted.get(one.descriptor.producer, 0) + 1:
                accepted[one.descriptor.producer] = one.descriptor.seq
                kept.append(one)
        state.queue, state.accepted = kept, accepted
        for producer in accepted:
            state.committed[producer] = max(state.committed.get(producer, 0), watermarks.get(producer, 0))

    def _recount(self, durable: Durable) -> None:
        state = self._state
        state.lines["heldout"].clear()
        state.frontier = max(state.frontier, durable.next_index)
        missing = [Lease("train", at) for at in (*durable.holes, *range(durable.next_index, state.frontier))]
        queued = [one.descriptor.lease for one in state.queue if one.descriptor.lease.split == "train"]
        expiry = time.monotonic() + self._limits.lease_s
        state.held = {
            lease: (holder, expiry)
            for lease, (holder, _) in state.held.items()
            if lease.split == "heldout" or (lease in missing and lease not in queued)
        }
        elsewhere = [*(lease for lease in state.held if lease.split == "train"), *queued]
        in_line = [lease for lease in state.lines["train"] if lease in missing and lease not in elsewhere]
        lost = [lease for lease in missing if lease not in elsewhere and lease not in in_line]
        state.lines["train"] = deque(dict.fromkeys(lost + in_line))
        state.answered = {lease for lease in state.answered if self._is_answered(lease, missing, queued)}
        state.consumed = durable.consumed
        state.admitted = durable.consumed + durable.waiting + len(elsewhere) + len(state.lines["train"])

    def _is_answered(self, lease: Lease, missing: Sequence[Lease], queued: Sequence[Lease]) -> bool:
        is_lost = lease not in queued and (lease in missing or lease.index >= self._state.frontier)
        return lease.split == "heldout" or not is_lost

    def read(self, max_groups: int, *, timeout_s: float) -> list[Delivery]:
        deadline = time.monotonic() + timeout_s
        while True:
            with self._state.lock:
                self._state.check_synced(self._fence, self._ticks)
                unread = [delivery for delivery in self._state.queue if self._is_unread(delivery.descriptor)]
                for delivery in unread[:max_groups]:
                    self._take(delivery.descriptor)
            if unread or time.monotonic() >= deadline:
                return unread[:max_groups]
            time.sleep(POLL_S)

    def _take(self, descriptor: Descriptor) -> None:
        if descriptor.seq != self._received.get(descriptor.producer, 0) + 1:
            raise LostDataError(f"group {descriptor.seq} of {descriptor.producer} does not follow")
        self._received[descriptor.producer] = descriptor.seq

    def release(self, consumed: int) -> None:
        with self._state.lock:
            self._state.check_fence(self._fence)
            self._state.consumed = max(self._state.consumed, consumed)

    def commit(self, watermarks: Mapping[str, int], *, duplicates: Collection[tuple[str, int]] = ()) -> None:
        state = self._state
        with state.lock:
            state.check_synced(self._fence, self._ticks)
            state.ticks += 1
            state.learner_silent_s = 0.0
            self._ticks = state.ticks
            for producer, mark in watermarks.items():
                for marks in (state.accepted, state.committed):
                    marks[producer] = max(marks.get(producer, 0), mark)
            kept = []
            for one in state.queue:
                if one.descriptor.seq > watermarks.get(one.descriptor.producer, 0):
                    kept.append(one)
                elif (one.descriptor.producer, one.descriptor.seq) in duplicates:
                    state.admitted -= 1
            state.queue = kept

    def quarantine(self, descriptor: Descriptor, payload: bytes, reason: str) -> None:
        with self._state.lock:
            self._state.check_fence(self._fence)
            self._state.quarantined += 1

    def request_evaluation(self, leases: Sequence[Lease]) -> None:
        state = self._state
        with state.lock:
            state.check_fence(self._fence)
            for lease in leases:
                state.answered.discard(lease)
                if lease not in state.held and lease not in state.lines["heldout"]:
                    state.lines["heldout"].append(lease)

    def stats(self) -> QueueStats:
        state = self._state
        with state.lock:
            state.check_fence(self._fence)
            return QueueStats(
                queued=len(state.queue),
                num_bytes=state.num_bytes,
                leased=len(state.held),
                returned=len(state.lines["train"]),
                admitted=state.admitted - state.consumed,
                quarantined=state.quarantined,
                full=state.full,
                late=state.late,
                expired=state.expired,
            )

    def _is_unread(self, descriptor: Descriptor) -> bool:
        return descriptor.seq > self._received.get(descriptor.producer, 0)
