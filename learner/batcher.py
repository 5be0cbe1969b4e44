"""From a stream of deliveries to the groups of one step, with every group accounted for exactly once."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lambdapo_async.broker.interface import Descriptor, RolloutSource
from lambdapo_async.config import RunConfig
from lambdapo_async.errors import BrokerUnavailable, TaskError
from lambdapo_async.rollout import RolloutGroup
from learner.evaluation import Evaluation
from learner.ingest import Discarded, Ingest, ReceivedGroup
from learner.parallel import ALONE, Ranks
from learner.watermarks import Watermarks

logger = logging.getLogger(__name__)

_LOG_EVERY_STEPS = 5
"""Steps' worth of discarded groups between two warnings."""
_MOST_DISCARDED_STEPS = 50
"""Steps' worth of discarded groups after which a step gives up."""
_TAKE_S = 0.5
"""Longest wait for one delivery; between two the loop looks whether it should stop."""
_IDLE_S = 0.02
"""From this wait on the learner has time for others: what it does for them delays no group that is already there."""


@dataclass(slots=True)
class StepBatch:
    """The groups of one optimizer step, and what else arrived on the way."""

    groups: list[ReceivedGroup] = field(default_factory=list)
    """What is trained on."""
    seen: list[RolloutGroup] = field(default_factory=list)
    """Every training group that arrived, discarded ones included: what rewards are averaged over."""
    discarded: Counter[str] = field(default_factory=Counter)
    """Groups discarded, by reason."""
    taken: list[Descriptor] = field(default_factory=list)
    """Everything that the step answers for."""
    wait_s: float = 0.0
    """Seconds in which the learner had nothing to do but wait for groups."""

    def staleness(self, version: int) -> NDArray[np.int64]:
        """[groups] versions between a group's oldest token and ``version``."""
        return np.array([version - received.group.min_version for received in self.groups])


class Batcher:
    """Gathers batches; knows what of the stream is done (trained, evaluated or discarded)."""

    def __init__(  # noqa: PLR0913 - the last three before ranks are a checkpoint's
        self,
        ingest: Ingest,
        source: RolloutSource,
        evaluation: Evaluation,
        config: RunConfig,
        *,
        watermarks: Watermarks,
        consumed: int,
        next_index: int,
        ranks: Ranks = ALONE,
    ) -> None:
        self._ingest, self._source, self._evaluation = ingest, source, evaluation
        self._config, self._ranks = config, ranks
        self._watermarks = watermarks
        # What is discarded stays in Redis until a checkpoint, and none can be taken within a step.
        self._most_discards = min(
            _MOST_DISCARDED_STEPS * config.rollout.groups_per_step, max(1, config.broker.max_groups // 4)
        )
        self.consumed = consumed
        """Training groups trained or discarded: what the admission gate counts."""
        self.durable_consumed = consumed
        """The same up to the last trained batch: what a checkpoint holds."""
        self.next_index = next_index
        """Training indices below it were leased in the surviving history."""

    def next_batch(
        self, version: int, *, stopping: threading.Event, while_idle: Callable[[], None]
    ) -> StepBatch | None:
        """Wait for the groups of one step; None once ``stopping`` is set.

        consumes: deliveries    waits for: ``groups_per_step`` groups with a signal    unblocks: a step

        Args:
            version: of the policy that will be trained on them.
            while_idle: called again and again while no group is there: what actors wait for before they sample.

        Raises:
            BrokerUnavailable: no group came for ``learner.data_timeout_s``.
        """
        batch = StepBatch()
        started = time.monotonic()
        while len(batch.groups) < self._config.rollout.groups_per_step:
            if stopping.is_set():
                return None
            received, waited_s = self._take()
            batch.wait_s += waited_s
            if waited_s >= _IDLE_S:
                while_idle()
            if received is not None:
                self._sort(received, batch, version)
            if received is not None or waited_s < _TAKE_S:
                started = time.monotonic()
            elif time.monotonic() - started > self._config.learner.data_timeout_s:
                raise BrokerUnavailable(
                    f"no rollout group came for learner.data_timeout_s = {self._config.learner.data_timeout_s:g} s: "
                    "is an actor alive?"
                )
        return batch

    def trained(self, batch: StepBatch) -> None:
        """The batch's effect is in the policy: a checkpoint from now on holds it."""
        for descriptor in batch.taken:
            self._watermarks.done(descriptor.producer, descriptor.seq)
            self.next_index = max(self.next_index, descriptor.lease.index + 1)
        self.consumed += len(batch.groups)
        self.durable_consumed = self.consumed

    def serve_evaluation(self) -> None:
        """Take held-out results while no training is due; training groups stay undone, for a later resume."""
        self._take()

    def watermarks(self) -> dict[str, int]:
        """producer -> number up to which all is done."""
        return self._watermarks.snapshot()

    def _take(self) -> tuple[ReceivedGroup | Discarded | None, float]:
        """The next training delivery, or None if it was a held-out one or none came; and the seconds it took."""
        self._ranks.pulse()
        started = time.monotonic()
        received = self._ingest.get(timeout_s=_TAKE_S)
        waited_s = time.monotonic() - started
        if received is None or received.descriptor.lease.split == "train":
            return received, waited_s
        self._watermarks.done(received.descriptor.producer, received.descriptor.seq)
        if isinstance(received, ReceivedGroup):
            self._evaluation.add(received.group)
        else:
            self._evaluation.skip(received.descriptor.lease)
        return None, waited_s

    def _sort(self, received: ReceivedGroup | Discarded, batch: StepBatch, version: int) -> None:
        batch.taken.append(received.descriptor)
        if received.group is not None:
            batch.seen.append(received.group)
        match received:
            case Discarded(reason=reason):
                self._discard(reason, batch)
            case ReceivedGroup() if version - received.group.min_version > self._config.staleness.drop_above:
                self._discard("stale", batch)
            case ReceivedGroup():
                batch.groups.append(received)

    def _discard(self, reason: str, batch: StepBatch) -> None:
        """The gate opens at once; the mark moves with the batch, so that a crash in between counts nothing twice."""
        batch.discarded[reason] += 1
        self.consumed += 1
        self._source.release(self.consumed)
        num_discarded = batch.discarded.total()
        if num_discarded % (_LOG_EVERY_STEPS * self._config.rollout.groups_per_step) == 0:
            logger.warning("%d groups in a row were discarded: %s", num_discarded, dict(batch.discarded))
        if num_discarded >= self._most_discards:
            raise TaskError(
                f"{num_discarded} groups for one step were discarded ({dict(batch.discarded)}): if their rewards are "
                "all equal, check task.rewards and task.answer_format, or make the task easier; if most rightly carry "
                "no signal, raise broker.max_groups or set rollout.filter_zero_variance = false"
            )
