"""From arrivals to the groups of one step: waits for them, and writes the step down before anybody trains on it."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from lambdapo_async.broker.interface import RolloutSource
from lambdapo_async.config import RunConfig
from lambdapo_async.errors import NoGroupsError, TaskError
from lambdapo_async.journal.journal import Journal
from learner.arrivals import Arrival
from learner.evaluation import Evaluation
from learner.ingest import Ingest
from learner.parallel import ALONE, Ranks
from learner.pool import Pool, StepBatch

logger = logging.getLogger(__name__)

_LOG_EVERY_STEPS = 5
"""Steps' worth of discarded groups between two warnings."""
_MOST_DISCARDED_STEPS = 50
"""Steps' worth of discarded groups after which a step gives up."""
_TAKE_S = 0.5
"""Longest wait for one arrival; between two the loop looks whether it should stop."""
_IDLE_S = 0.02
"""From this wait on the learner has time for others: what it does for them delays no group that is already there."""
_USELESS = ("malformed", "zero_variance", "stale", "too_large", "duplicate", "unleased", "quarantined")
"""What may happen to a group that no step was made of."""
_SAY_EVERY_S = 30.0
"""Seconds of silence after which a waiting learner says what for."""


class Batcher:
    """Gathers batches from the pool, which it feeds with what arrives."""

    def __init__(
        self,
        ingest: Ingest,
        source: RolloutSource,
        evaluation: Evaluation,
        pool: Pool,
        journal: Journal,
        config: RunConfig,
        ranks: Ranks = ALONE,
    ) -> None:
        self._ingest, self._source, self._evaluation = ingest, source, evaluation
        self.pool, self._journal = pool, journal
        self._config, self._ranks = config, ranks
        self._pending: deque[Arrival] = deque()  # comes before anything that the ingest hands over
        self.released = pool.consumed
        """Training groups that the gate was told are consumed; a step's are, with the version that it makes."""

    def next_batch(
        self, step: int, version: int, *, stopping: threading.Event, while_idle: Callable[[], None]
    ) -> StepBatch | None:
        """Wait for the groups of ``step`` and journal that it trains on them; None once ``stopping`` is set.

        consumes: arrivals    waits for: as many groups as the replay queue wants    unblocks: a step

        Args:
            version: of the policy that will be trained on them.
            while_idle: called again and again while no group is there: what actors wait for before they sample.

        Raises:
            NoGroupsError: no group came for ``learner.data_timeout_s``.
            LostDataError, BrokerUnavailable: of Redis; call it again once that is dealt with, nothing is lost.
            TaskError: too many groups in a row carried no signal.
        """
        self.pool.advance(version)
        self._release()
        patience, discarded = _Patience(self._config.learner.data_timeout_s), _Discards(self._config, self.pool)
        wait_s = 0.0
        self._drain()
        while not self.pool.can_sample():
            if stopping.is_set():
                return None
            arrival, waited_s = self._take(timeout_s=_TAKE_S)
            wait_s += waited_s
            if arrival is not None:
                self._deal_with(arrival)
                discarded.check()
            if waited_s >= _IDLE_S:
                while_idle()
            patience.check(self.pool, has_arrival=arrival is not None)
        record, batch = self.pool.sample(step, version)
        self._journal.append([record])
        batch.wait_s = wait_s
        return batch

    def resume(self, pending: Iterable[Arrival]) -> None:
        """``pending`` arrived in an earlier life, after the last step that was taken again; it comes first."""
        self._pending.extend(pending)
        self.released = self.pool.consumed

    def evaluate(self, arrival: Arrival) -> None:
        """Hand a held-out answer to the evaluation."""
        if arrival.received is not None:
            self._evaluation.add(arrival.received.group)
        else:
            self._evaluation.skip(arrival.record.descriptor.lease)

    def serve_evaluation(self) -> None:
        """Take held-out results while no training is due; training groups stay where they are durable."""
        arrival, _ = self._take(timeout_s=_TAKE_S)
        if arrival is not None and not arrival.is_training:
            self.evaluate(arrival)

    def _drain(self) -> None:
        """With reuse a step draws from everything that is here; a plain stream takes no more than it needs."""
        if self._config.replay.max_uses == 1:
            return
        while (arrival := self._take(timeout_s=0.0)[0]) is not None:
            if not self._deal_with(arrival):
                return

    def _take(self, *, timeout_s: float) -> tuple[Arrival | None, float]:
        """The next arrival, and the seconds it took."""
        self._ranks.pulse()
        if self._pending:
            return self._pending.popleft(), 0.0
        started = time.monotonic()
        return self._ingest.take(timeout_s=timeout_s), time.monotonic() - started

    def _deal_with(self, arrival: Arrival) -> bool:
        """Whether the pool took it; after False a batch can be taken, and it comes next."""
        if not self.pool.offer(arrival):
            self._pending.appendleft(arrival)
            return False
        if not arrival.is_training:
            self.evaluate(arrival)
        self._release()
        return True

    def _release(self) -> None:
        """The gate opens at once for what will not be trained on; for a step's groups, with the version it makes."""
        if self.pool.consumed > self.released:
            self._source.release(self.pool.consumed)
            self.released = self.pool.consumed


class _Patience:
    """Says what a learner waits for, now and then, and for how long it does at most."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._since = self._said = time.monotonic()

    def check(self, pool: Pool, *, has_arrival: bool) -> None:
        now = time.monotonic()
        if has_arrival:
            self._since = self._said = now
        if now - self._since > self._timeout_s:
            raise NoGroupsError(
                f"no rollout group came for learner.data_timeout_s = {self._timeout_s:g} s, and {_needed(pool)}: is an "
                "actor alive?"
            )
        if now - self._said > _SAY_EVERY_S:
            self._said = now
            logger.info("waiting for groups for %.0f s: %s", now - self._since, _needed(pool))


def _needed(pool: Pool) -> str:
    return f"the replay queue, which holds {pool.num_groups}, needs {pool.missing_inserts()} more for a step"


class _Discards:
    """Ends a run from which nothing can be learned."""

    def __init__(self, config: RunConfig, pool: Pool) -> None:
        self._step_groups, self._pool = config.rollout.groups_per_step, pool
        self._before = self._count()
        self._said = 0

    def check(self) -> None:
        now = self._count()
        discarded = {reason: count - self._before[reason] for reason, count in now.items()}
        total = sum(discarded.values())
        if total - self._said >= _LOG_EVERY_STEPS * self._step_groups:
            self._said = total
            logger.warning("%d groups in a row were discarded: %s", total, discarded)
        if total >= _MOST_DISCARDED_STEPS * self._step_groups:
            raise TaskError(
                f"{total} groups for one step were discarded ({discarded}): if their rewards are all equal, check "
                "task.rewards and task.answer_format, or make the task easier; if most rightly carry no signal, set "
                "rollout.filter_zero_variance = false"
            )

    def _count(self) -> dict[str, int]:
        return {reason: self._pool.totals.get(reason, 0) for reason in _USELESS}
