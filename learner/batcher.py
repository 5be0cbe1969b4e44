"""From a stream of deliveries to the groups of one step, with every group accounted for exactly once."""

import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lambdapo_async.broker.interface import Descriptor, RolloutSource
from lambdapo_async.config import RunConfig
from lambdapo_async.errors import BrokerUnavailable
from lambdapo_async.rollout import RolloutGroup
from learner.evaluation import Evaluation
from learner.ingest import Discarded, Ingest, ReceivedGroup
from learner.watermarks import Watermarks


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The groups of one optimizer step."""

    groups: tuple[ReceivedGroup, ...]
    seen: tuple[RolloutGroup, ...]
    """Every training group that arrived for this step, the discarded ones included: what rewards are averaged over."""
    discarded: Counter[str] = field(default_factory=Counter)
    """Groups discarded while the batch was gathered, by reason."""
    wait_s: float = 0.0
    """Seconds in which the learner had nothing to do but wait for groups."""

    def staleness(self, version: int) -> NDArray[np.int64]:
        """[groups] versions between a group's oldest token and ``version``."""
        return np.array([version - received.group.min_version for received in self.groups])


class Batcher:
    """Gathers batches; knows what of the stream is done (trained, evaluated or discarded)."""

    def __init__(
        self,
        ingest: Ingest,
        source: RolloutSource,
        evaluation: Evaluation,
        config: RunConfig,
        *,
        watermarks: Watermarks,
        consumed: int,
        next_index: int,
    ) -> None:
        self._ingest, self._source, self._evaluation = ingest, source, evaluation
        self._config = config
        self._watermarks = watermarks
        self.consumed = consumed
        """Training groups trained or discarded in the surviving history."""
        self.next_index = next_index
        """Training indices below it were leased in the surviving history."""

    def next_batch(self, version: int) -> StepBatch:
        """Wait for the groups of one step.

        consumes: deliveries    waits for: ``groups_per_step`` groups with a signal    unblocks: a step

        Raises:
            BrokerUnavailable: no group came for ``learner.data_timeout_s``.
        """
        groups: list[ReceivedGroup] = []
        seen: list[RolloutGroup] = []
        discarded: Counter[str] = Counter()
        wait_s = 0.0
        while len(groups) < self._config.rollout.groups_per_step:
            received, waited_s = self._take()
            wait_s += waited_s
            if received is None:
                continue
            if received.descriptor.lease.split == "train" and received.group is not None:
                seen.append(received.group)
            match received:
                case Discarded(descriptor=descriptor, reason=reason):
                    self._discard(descriptor)
                    discarded[reason] += 1
                case ReceivedGroup(descriptor=descriptor) if self._is_stale(received, version):
                    self._discard(descriptor)
                    discarded["stale"] += 1
                case ReceivedGroup():
                    groups.append(received)
        return StepBatch(tuple(groups), tuple(seen), discarded, wait_s)

    def trained(self, batch: StepBatch) -> None:
        """The batch's effect is in the policy: a checkpoint from now on holds it."""
        for received in batch.groups:
            self._done(received.descriptor)

    def serve_evaluation(self, *, timeout_s: float) -> None:
        """Go on taking held-out results while no training is due; training groups stay undone, for a later resume."""
        self._take(timeout_s=timeout_s)

    def watermarks(self) -> dict[str, int]:
        """producer -> number up to which all is done."""
        return self._watermarks.snapshot()

    def _take(self, *, timeout_s: float | None = None) -> tuple[ReceivedGroup | Discarded | None, float]:
        """The next training delivery, or None if it was a held-out one; and the seconds it took to come."""
        deadline_s = timeout_s if timeout_s is not None else self._config.learner.data_timeout_s
        started = time.monotonic()
        received = self._ingest.get(timeout_s=deadline_s)
        waited_s = time.monotonic() - started
        if received is None:
            if timeout_s is None:
                raise BrokerUnavailable(
                    f"no rollout group came for learner.data_timeout_s = {deadline_s:g} s: is an actor alive?"
                )
            return None, waited_s
        if received.descriptor.lease.split == "heldout":
            self._watermarks.done(received.descriptor.producer, received.descriptor.seq)
            if isinstance(received, ReceivedGroup):
                self._evaluation.add(received.group)
            return None, waited_s
        return received, waited_s

    def _is_stale(self, received: ReceivedGroup, version: int) -> bool:
        return version - received.group.min_version > self._config.staleness.drop_above

    def _discard(self, descriptor: Descriptor) -> None:
        self._done(descriptor)
        self._source.release(self.consumed)

    def _done(self, descriptor: Descriptor) -> None:
        self._watermarks.done(descriptor.producer, descriptor.seq)
        self.consumed += 1
        self.next_index = max(self.next_index, descriptor.lease.index + 1)
