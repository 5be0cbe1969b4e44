"""Weight files in memory."""

import time
from collections.abc import Sequence

from lambdapo_async.config.weights import WeightsConfig
from lambdapo_async.errors import LostDataError, WeightsError, WeightsGoneError, WeightsLostError
from lambdapo_async.weights.catch_up import Available
from lambdapo_async.weights.manifest import NewFile, base_of, check_version, name_of
from lambdapo_async.weights.retention import Retention
from tests.fakes_redis_run import POLL_S, FakeRedisRun


class FakeWeightStore:
    """``interface.WeightStore``; readers copy at once, so that it needs no reader leases."""

    def __init__(self, state: FakeRedisRun, config: WeightsConfig = WeightsConfig()) -> None:  # noqa: B008 - frozen
        self._state = state
        self._retention = Retention(max_bytes=config.budget_bytes, grace_s=config.grace_s)

    def publish(self, version: int, files: Sequence[NewFile], *, consumed: int, fence: int) -> None:
        state = self._state
        check_version(version, files)
        with state.lock:
            state.check_fence(fence)
            incoming_bytes = sum(len(file.payload) for file in files)
            for lost in self.lost():
                del state.weight_files[lost]
            state.lost_files.clear()
            for dropped in self._retention.to_drop(self.files(), incoming_bytes=incoming_bytes):
                del state.weight_files[dropped]
            if state.head is not None and version <= state.head:
                raise WeightsError(f"version {version} is not above the head {state.head}")
            base = base_of(files)
            if (state.limits is not None and not state.is_open) or (base is not None and base != state.head):
                raise LostDataError("the newest weights are gone")
            state.weight_files.update({file.available: file.payload for file in files})
            state.head = version
            state.consumed = max(state.consumed, consumed)

    def head(self) -> int | None:
        with self._state.lock:
            return self._state.head

    def wait_newer(self, than: int, *, timeout_s: float) -> int | None:
        deadline = time.monotonic() + timeout_s
        while True:
            head = self.head()
            if head is not None and head > than:
                return head
            if time.monotonic() >= deadline:
                return None
            time.sleep(POLL_S)

    def files(self) -> tuple[Available, ...]:
        with self._state.lock:
            return tuple(sorted(self._state.weight_files, key=lambda file: (file.version, name_of(file))))

    def lost(self) -> tuple[Available, ...]:
        with self._state.lock:
            return tuple(file for file in self.files() if file in self._state.lost_files)

    def fetch(self, file: Available) -> bytes:
        with self._state.lock:
            if file not in self._state.weight_files:
                raise WeightsGoneError(f"{name_of(file)} is gone: the head is {self._state.head}")
            if file in self._state.lost_files:
                raise WeightsLostError(f"a part of {name_of(file)} is gone")
            return self._state.weight_files[file]
