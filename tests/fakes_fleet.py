"""The fleet in memory: heartbeats, and which actors are set aside."""

import time
from collections.abc import Collection

from lambdapo_async.broker.heartbeat import Heartbeat
from tests.fakes_redis_run import FakeRedisRun


class FakeFleet:
    """``interface.Fleet``"""

    def __init__(self, state: FakeRedisRun) -> None:
        self._state = state

    def beat(self, heartbeat: Heartbeat) -> bool:
        with self._state.lock:
            lease_s = self._state.limits.lease_s if self._state.limits else 60.0
            self._state.beats[heartbeat.actor_id] = (heartbeat, time.monotonic() + lease_s)
            return heartbeat.actor_id in self._state.set_aside

    def members(self) -> tuple[Heartbeat, ...]:
        with self._state.lock:
            beats = (self._state.beats[actor_id] for actor_id in sorted(self._state.beats))
            return tuple(heartbeat for heartbeat, expiry in beats if expiry > time.monotonic())

    def leave(self, actor_id: str) -> None:
        with self._state.lock:
            self._state.beats.pop(actor_id, None)


class FakeFleetControl:
    """``fleet_control.FleetControl``"""

    def __init__(self, state: FakeRedisRun, fence: int) -> None:
        self._state, self._fence = state, fence

    def quarantine(self, actor_ids: Collection[str]) -> None:
        state = self._state
        with state.lock:
            state.check_fence(self._fence)
            state.set_aside |= set(actor_ids)
            theirs = [lease for lease, (holder, _) in state.held.items() if holder in state.set_aside]
            state.put_in_front(sorted(theirs, key=lambda lease: (state.held[lease][1], lease.id)))

    def readmit(self, actor_ids: Collection[str]) -> None:
        with self._state.lock:
            self._state.check_fence(self._fence)
            self._state.set_aside -= set(actor_ids)

    def quarantined(self) -> frozenset[str]:
        with self._state.lock:
            return frozenset(self._state.set_aside)
