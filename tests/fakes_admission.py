"""Leases in memory, and the partial groups that are kept under them."""

import time
from collections.abc import Sequence

from lambdapo_async.broker.partials import SHARE_OF_QUEUE
from lambdapo_async.rollout import Lease
from tests.fakes_redis_run import FakeRedisRun


class FakeAdmission:
    """``interface.Admission``"""

    def __init__(self, state: FakeRedisRun, actor_id: str) -> None:
        self._state, self._actor_id = state, actor_id

    def lease(self, max_count: int) -> tuple[Lease, ...]:
        state = self._state
        with state.lock:
            if state.phase != "running" or state.limits is None or not state.is_open:
                return ()
            if self._actor_id in state.set_aside:
                return ()
            now = time.monotonic()
            expired = [lease for lease, (_, expiry) in state.held.items() if expiry <= now]
            state.expired += len(expired)
            state.put_in_front(sorted(expired, key=lambda lease: (state.held[lease][1], lease.id)))
            limits = state.limits
            room = min(limits.max_groups - len(state.queue), (limits.max_bytes - state.num_bytes) // limits.group_bytes)
            max_count = min(max_count, room - len(state.held))
            granted: list[Lease] = []
            for line in (state.lines["heldout"], state.lines["train"]):
                while line and len(granted) < max_count:
                    granted.append(line.popleft())
            while len(granted) < max_count and state.admitted - state.consumed < state.limits.capacity:
                lease = Lease("train", state.frontier)
                state.frontier += 1
                if lease not in state.answered:
                    granted.append(lease)
                    state.admitted += 1
            for lease in granted:
                state.held[lease] = (self._actor_id, now + state.limits.lease_s)
            return tuple(granted)

    def renew(self, leases: Sequence[Lease]) -> tuple[Lease, ...]:
        state = self._state
        with state.lock:
            if not state.is_open:
                return ()
            lost = tuple(lease for lease in leases if state.held.get(lease, ("",))[0] != self._actor_id)
            for lease in set(leases) - set(lost):
                assert state.limits is not None
                state.held[lease] = (self._actor_id, time.monotonic() + state.limits.lease_s)
            return lost

    def hand_back(self, leases: Sequence[Lease]) -> None:
        with self._state.lock:
            ours = [lease for lease in leases if self._state.held.get(lease, ("",))[0] == self._actor_id]
            # One named twice is put back once, where it is named last.
            self._state.put_in_front([*dict.fromkeys(reversed(ours))][::-1])


class FakePartials:
    """``partials.PartialStore``; nothing expires."""

    def __init__(self, state: FakeRedisRun, actor_id: str) -> None:
        self._state, self._actor_id = state, actor_id

    def leave(self, lease: Lease, payload: bytes) -> bool:
        state = self._state
        with state.lock:
            others = sum(len(kept) for of, kept in state.partials.items() if of != lease)
            limit = 0.0 if state.limits is None else state.limits.max_bytes / SHARE_OF_QUEUE
            if not self._holds(lease) or others + len(payload) > limit:
                return False
            state.partials[lease] = payload
            return True

    def take(self, lease: Lease) -> bytes | None:
        with self._state.lock:
            return self._state.partials.get(lease) if self._holds(lease) else None

    def forget(self, lease: Lease) -> None:
        with self._state.lock:
            self._state.partials.pop(lease, None)

    def _holds(self, lease: Lease) -> bool:
        return self._state.held.get(lease, ("",))[0] == self._actor_id
