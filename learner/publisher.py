"""Sends weight versions to the store while the learner goes on training."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from types import TracebackType
from typing import Protocol, Self

from torch import Tensor

from lambdapo_async.broker.interface import WeightStore
from lambdapo_async.config.weights import WeightsConfig
from lambdapo_async.errors import BrokerError, WeightsError
from lambdapo_async.weights.catch_up import plan_catch_up
from lambdapo_async.weights.state import State
from learner.crew import Crew
from learner.parallel import ALONE, Ranks
from learner.weight_mirror import Release, WeightMirror

PUBLISH_DEADLINE_S = 600.0
"""Seconds that one publish may take before the step that waits for it gives up."""
_ENCODERS = 4  # threads: numpy, xxhash and zstd let go of the GIL


class Snapshottable(Protocol):
    """What is published: the learner's ``Policy``."""

    def published(self) -> Iterator[tuple[str, Tensor]]:
        """Hugging Face name and CPU tensor of every weight, mostly bfloat16, gathered from the ranks one by one.

        What is trained is copied.
        """


class Publisher:
    """Publishes on one background thread; a step waits only while the previous publish still runs.

    Each version goes out as the difference from the last one that the store took (see ``WeightMirror``). An error of
    the thread is raised by the next call, and the version it concerned is not repeated: the next one starts from what
    the store's head proves to be out. Not thread-safe: one caller, on rank 0; the gathering happens in its thread,
    for no collective may run beside another.
    """

    def __init__(
        self,
        store: WeightStore,
        *,
        run_id: str,
        fence: int,
        config: WeightsConfig = WeightsConfig(),  # noqa: B008 - frozen
        ranks: Ranks = ALONE,
        deadline_s: float = PUBLISH_DEADLINE_S,
        newest_version: int = -1,
    ) -> None:
        """``newest_version``: that an actor may have seen, as far as the caller knows."""
        self._store = store
        self._crew = Crew(ranks)
        self._fence = fence
        self._deadline_s = deadline_s
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="publisher")
        self._encoders = ThreadPoolExecutor(max_workers=_ENCODERS, thread_name_prefix="encoder")
        self._mirror = WeightMirror(run_id=run_id, config=config, pool=self._encoders)
        self._running: Future[Mapping[str, float]] | None = None
        self._newest: State | None = None
        self._report: Mapping[str, float] = {}
        self._stall_s = 0.0
        self.newest_version = newest_version
        """That an actor may have seen, of an earlier learner too; its publish may still run."""

    def publish(self, version: int, policy: Snapshottable, *, consumed: int) -> None:
        """Copy the weights now, send them in the background as ``version``.

        Args:
            version: larger than any version before.
            policy: may be trained on as soon as this returns.
            consumed: training groups trained or discarded when these weights were made.

        Raises:
            WeightsError, BrokerError: of the previous publish, or it exceeded its deadline.
        """
        self.flush()
        self.newest_version = version
        self._crew.publish()
        self._newest = State.of_torch(version, dict(policy.published()))
        self._running = self._thread.submit(self._send, self._newest, consumed)

    def settle(self) -> None:
        """Wait until nothing is being published, whatever became of it."""
        with contextlib.suppress(BrokerError, WeightsError):  # what it died of comes back if it is sent again
            self.flush()

    @property
    def is_publishing(self) -> bool:
        """Whether a publish still runs."""
        return self._running is not None and not self._running.done()

    def is_out(self) -> bool:
        """Whether readers can have the newest state; to be asked after :meth:`flush` or :meth:`settle`.

        A delta may have reached a store that had just lost its base, or the store lost a part since: then nothing leads
        there. And one whose reply was lost is out, but not known to be: the checksum would be another version's.
        """
        if self._newest is None:
            return True
        if not self._mirror.version == self._store.head() == self._newest.version:
            return False
        if self._store.lost():
            return False
        try:
            plan_catch_up(self._store.files(), at=None, head=self._newest.version)
        except WeightsError:
            return False
        return True

    def republish(self, version: int, *, consumed: int) -> None:
        """Send the newest state once more, whole and under a new number: the store lost it, or never took it.

        Returns when it is out. Nothing happens before the first :meth:`publish`.

        Raises:
            WeightsError, BrokerError: it could not be sent.
        """
        self.settle()
        if self._newest is None:
            return
        self.newest_version = version
        self._newest = State(version, self._newest.tensors)
        self._running = self._thread.submit(self._send, self._newest, consumed, is_lost=True)
        self.flush()

    def newest_state(self) -> State:
        """The newest state that was to be published, bit for bit; ``WeightsError`` before the first."""
        if self._newest is None:
            raise WeightsError("nothing was published yet")
        return self._newest

    def flush(self) -> None:
        """Wait until nothing is being published; raises what went wrong."""
        running, self._running = self._running, None
        if running is None:
            return
        started = time.monotonic()
        try:
            self._report = running.result(timeout=self._deadline_s)
        except FutureTimeoutError as error:
            raise WeightsError(
                f"publishing took over {self._deadline_s:g} s: the store is too slow or unreachable"
            ) from error
        finally:
            self._stall_s += time.monotonic() - started

    @property
    def keyframe_version(self) -> int:
        """Newest keyframe that the store took; -1 before the first. Of the newest version only after :meth:`flush`."""
        return self._mirror.keyframe_version

    def checksum(self) -> str:
        """Of the newest published state; to be asked after :meth:`flush` only.

        Raises:
            WeightsError: nothing was published yet.
        """
        return self._mirror.checksum()

    def take_stall_s(self) -> float:
        """Seconds that the caller waited for publishes since the last call of this."""
        stall_s, self._stall_s = self._stall_s, 0.0
        return stall_s

    def take_report(self) -> Mapping[str, float]:
        """``weights/*`` metrics of the last publish that a call waited for; empty if they were taken already."""
        report, self._report = self._report, {}
        return report

    def close(self) -> None:
        """Flush and end the threads; they are asked to end even when the flush fails."""
        try:
            self.flush()
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._encoders.shutdown(wait=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; what the last publish died of matters only if nothing else went wrong."""
        with contextlib.nullcontext() if error is None else contextlib.suppress(BrokerError, WeightsError):
            self.close()

    def _send(self, state: State, consumed: int, *, is_lost: bool = False) -> Mapping[str, float]:
        release = self._mirror.prepare(state, head=None if is_lost else self._store.head())
        started = time.perf_counter()
        self._store.publish(state.version, release.files, consumed=consumed, fence=self._fence)
        self._mirror.advance(release)  # only now: a difference from what readers never got is worth nothing
        return _metrics(release, publish_s=time.perf_counter() - started)


def _metrics(release: Release, *, publish_s: float) -> Mapping[str, float]:
    return {
        "weights/bytes": float(release.num_bytes),
        "weights/keyframe": float(release.is_keyframe),
        "weights/union": float(release.has_union),
        "weights/changed": release.changed_share,
        "weights/encode_s": release.encode_s,
        "weights/publish_s": publish_s,
    }
