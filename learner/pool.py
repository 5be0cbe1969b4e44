"""What the learner holds of the stream between arrival and step, and what became of every group so far.

No thread, no clock, no Redis: a pool is a function of the order of its calls, and the journal keeps that order. So a
resumed learner, and one that replays a recorded run, make the batches that were made before.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, NonNegativeInt

from lambdapo_async.config import RunConfig
from lambdapo_async.journal.receipts import NOT_COUNTED
from lambdapo_async.journal.records import StepRecord
from lambdapo_async.replay.bias import BiasMeter, BiasState
from lambdapo_async.replay.limits import ReplayError, ReplayLimits
from lambdapo_async.replay.queue import ReplayEntry, ReplayQueue, ReplaySnapshot
from learner.arrivals import Arrival, ReceivedGroup, Screen, shape_of
from learner.tally import ArrivalTally


class PoolState(BaseModel):
    """Part of a checkpoint; the groups themselves are in the journal."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    taken: NonNegativeInt = 0
    """Number of the last record that was dealt with."""
    keep_from: NonNegativeInt = 1
    """First record that is needed to go on from here."""
    num_discarded: NonNegativeInt = 0
    """Training groups given up on arrival; duplicates are not counted."""
    totals: dict[str, NonNegativeInt] = {}
    """Groups over the whole run, by what became of them."""
    dropped: tuple[tuple[NonNegativeInt, str], ...] = ()
    """(record number, reason) of what left the queue since the last step."""
    replay: ReplaySnapshot = ReplaySnapshot()
    bias: BiasState = BiasState()


@dataclass(slots=True)
class StepBatch:
    """The groups of one optimizer step, and what is to be told of how they came."""

    groups: list[ReceivedGroup]
    """What is trained on."""
    version: int
    """Policy version that the step starts from."""
    arrived: Mapping[str, float] = field(default_factory=dict)
    """Metrics of everything that arrived since the step before."""
    totals: Mapping[str, int] = field(default_factory=dict)
    """Groups so far, by what became of them."""
    bias: Mapping[str, float] = field(default_factory=dict)
    """Metrics of trained against generated groups, and of the queue."""
    wait_s: float = 0.0
    """Seconds in which the learner had nothing to do but wait for groups."""

    def staleness(self) -> NDArray[np.int64]:
        """[groups] versions between a group's oldest token and the step's."""
        return np.array([self.version - received.group.min_version for received in self.groups])


class Pool:
    """Replay queue, counts and bias meter of one run. Not thread-safe: the learner's loop owns it.

    Args:
        members: arrivals of the checkpoint's queue, in any order.

    Raises:
        ReplayError: a member is missing.
    """

    def __init__(
        self, config: RunConfig, screen: Screen, state: PoolState | None = None, members: Iterable[Arrival] = ()
    ) -> None:
        state = state or PoolState()
        self._screen = screen
        entries = map(screen.entry, members)
        self._queue = ReplayQueue[ReceivedGroup](ReplayLimits.of(config), state.replay, entries)
        self._taken, self._num_discarded = state.taken, state.num_discarded
        self._totals, self._dropped = Counter(state.totals), list(state.dropped)
        self._bias = BiasMeter(state.bias)
        self._arrived = ArrivalTally()

    @property
    def taken(self) -> int:
        """Number of the last record that was dealt with."""
        return self._taken

    @property
    def consumed(self) -> int:
        """Training groups that the admission gate counts no more."""
        return self._queue.consumed + self._num_discarded

    @property
    def num_groups(self) -> int:
        """Groups in the queue."""
        return self._queue.num_groups

    @property
    def totals(self) -> Mapping[str, int]:
        """Groups over the whole run, by what became of them."""
        return dict(self._totals)

    def missing_inserts(self) -> int:
        """Groups that must go in before the next batch, at least."""
        return self._queue.missing_inserts()

    def can_sample(self) -> bool:
        """Whether a batch can be taken."""
        return self._queue.can_sample()

    def advance(self, version: int) -> None:
        """The next batch is for the policy of ``version``: what is too old for it goes."""
        self._queue.advance(version)
        self._note_drops()

    def offer(self, arrival: Arrival) -> bool:
        """Whether ``arrival`` was dealt with; after False a batch can be taken, and it must be offered again."""
        record, received = arrival.record, arrival.received
        if not record.discarded and arrival.is_training:
            if not self._queue.offer(self._screen.entry(arrival)):
                return False
        elif arrival.is_training:
            self._discard(record.discarded, received)
        self._taken = arrival.number
        if received is not None and arrival.is_training:
            self._arrived.add(received.group)
            self._bias.generated(shape_of(received.group))
        self._note_drops()
        return True

    def sample(self, step: int, version: int) -> tuple[StepRecord, StepBatch]:
        """Take the batch of ``step``, which starts from ``version``, and what the journal is to say of it."""
        return self._close(step, version, self._queue.sample())

    def take(self, step: StepRecord) -> StepBatch:
        """Take the batch of a step that is in the journal.

        Raises:
            ReplayError: this is not the queue that the step was chosen from.
        """
        return self._close(step.step, step.version, self._queue.take(step.chosen))[1]

    def redo(self, step: StepRecord, arrivals: Iterable[Arrival]) -> StepBatch:
        """Do everything that led to a journaled step again.

        Raises:
            ReplayError: it cannot have been so with these settings.
        """
        self.advance(step.version)
        for arrival in arrivals:
            if not self.offer(arrival):
                raise ReplayError(
                    f"step {step.step} was chosen after record {arrival.number} went into the replay queue, which has "
                    "no room for it: go on with the replay settings of the recorded run"
                )
        return self.take(step)

    def state(self) -> PoolState:
        """For the checkpoint."""
        return PoolState(
            taken=self._taken,
            keep_from=min(self._queue.oldest_number(), self._taken + 1),
            num_discarded=self._num_discarded,
            totals=self._totals,
            dropped=tuple(self._dropped),
            replay=self._queue.snapshot(),
            bias=self._bias.state(),
        )

    def _close(
        self, step: int, version: int, entries: Sequence[ReplayEntry[ReceivedGroup]]
    ) -> tuple[StepRecord, StepBatch]:
        self._note_drops()
        for entry in entries:
            self._bias.trained(entry.shape)
        self._totals["trained"] += len(entries)
        chosen = tuple(entry.number for entry in entries)
        record = StepRecord(step, version, self._taken, chosen, tuple(self._dropped))
        batch = StepBatch(
            groups=[entry.item for entry in entries],
            version=version,
            arrived=self._arrived.metrics(),
            totals=dict(self._totals),
            bias=self._metrics(),
        )
        self._dropped, self._arrived = [], ArrivalTally()
        return record, batch

    def _discard(self, reason: str, received: ReceivedGroup | None) -> None:
        self._totals[reason] += 1
        self._num_discarded += reason not in NOT_COUNTED
        if received is not None:
            self._bias.dropped(reason, shape_of(received.group))

    def _note_drops(self) -> None:
        for drop in self._queue.take_drops():
            self._dropped.append((drop.number, drop.reason))
            if drop.reason != "exhausted":
                self._totals[drop.reason] += 1
            if drop.uses == 0:
                self._bias.dropped(drop.reason, drop.shape)

    def _metrics(self) -> dict[str, float]:
        by_length = {
            f"bias/{reason}_upto_{bucket}": float(count)
            for reason, buckets in self._bias.state().dropped.items()
            for bucket, count in buckets.items()
        }
        return {
            "bias/length_ratio": self._bias.length_ratio,
            "bias/difficulty_gap": self._bias.difficulty_gap,
            "replay/groups": float(self._queue.num_groups),
            "replay/bytes": float(self._queue.num_bytes),
            "replay/rate_error": self._queue.rate_error,
            **by_length,
        }
