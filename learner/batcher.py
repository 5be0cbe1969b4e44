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
_ATTENDED_S = 1.0
"""Nobody waits longer for a learner that gathers groups, not even while useless ones come without a pause."""
_STALE = "stale"
_USELESS = ("malformed", "zero_variance", "too_large", "duplicate", "unleased", "quarantined")
"""What may happen to a group that no step was made of, beside growing stale."""
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
            while_idle: called again and again until the groups are there: what actors wait for before they sample.

        Raises:
            NoGroupsError: no group came for ``learner.data_timeout_s``, or stale ones alone.
            LostDataError, BrokerUnavailable: of Redis; call it again once that is dealt with, nothing is lost.
            TaskError: too many groups in a row carried no signal; those of an earlier life do not count.
        """
        self.pool.advance(version)
        self._release()
        patience = _Patience(self._config.learner.data_timeout_s, self.pool)
        discards = _Discards(self._config, self.pool)
        wait_s, attended = 0.0, time.monotonic()
        self._drain()
        while not self.pool.can_sample():
            if stopping.is_set():
                return None
            is_of_this_life = not self._pending
            arrival, waited_s = self._take(timeout_s=_TAKE_S)
            wait_s += waited_s
            if arrival is not None:
                self._deal_with(arrival)
                discards.check(counts=is_of_this_life)
            if waited_s >= _IDLE_S or time.monotonic() - attended >= _ATTENDED_S:
                while_idle()
                attended = time.monotonic()
            patience.check(has_arrival=arrival is not None)
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

    def __init__(self, timeout_s: float, pool: Pool) -> None:
        self._timeout_s, self._pool = timeout_s, pool
        self._since = self._said = time.monotonic()
        self._num_stale = self._stale_before = _num_stale(pool)

    def check(self, *, has_arrival: bool) -> None:
        now, num_stale = time.monotonic(), _num_stale(self._pool)
        if has_arrival and num_stale == self._num_stale:
            self._since = self._said = now
            self._stale_before = num_stale
        self._num_stale = num_stale
        if now - self._since > self._timeout_s:
            raise NoGroupsError(
                f"no rollout group came for learner.data_timeout_s = {self._timeout_s:g} s, and {self._missing()}: is "
                "an actor alive, and does it follow the weights?"
            )
        if now - self._said > _SAY_EVERY_S:
            self._said = now
            logger.info("waiting for groups for %.0f s: %s", now - self._since, self._missing())

    def _missing(self) -> str:
        pool = self._pool
        missing = f"the replay queue, which holds {pool.num_groups}, needs {pool.missing_inserts()} more for a step"
        num_stale = self._num_stale - self._stale_before
        return f"{missing} ({num_stale} were stale)" if num_stale else missing


def _num_stale(pool: Pool) -> int:
    return pool.totals.get(_STALE, 0)


class _Discards:
    """Ends a run from which nothing can be learned."""

    def __init__(self, config: RunConfig, pool: Pool) -> None:
        self._step_groups, self._pool = config.rollout.groups_per_step, pool
        self._before, self._said, self._num_stale = self._count(), 0, _num_stale(pool)

    def check(self, *, counts: bool) -> None:
        """After each arrival; ``counts`` is false for those that another life has dealt with, and ended by.

        A stale group ends the row: it had a signal, and the others around it are as stale.
        """
        num_stale = _num_stale(self._pool)
        if not counts or num_stale > self._num_stale:
            self._before, self._said, self._num_stale = self._count(), 0, num_stale
            return
        discarded = {reason: count - self._before[reason] for reason, count in self._count().items()}
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
