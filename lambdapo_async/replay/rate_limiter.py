"""Keeps samples and inserts in proportion: ``SampleToInsertRatio`` of Reverb (Cassirer et al., arXiv:2102.04736).

    error = (inserts - min_size) * samples_per_insert - samples

While the queue holds fewer than ``min_size`` groups, inserts are free and samples wait. From then on inserts wait
where they would bring the error above ``error_buffer``, and samples where they would bring it below
``-error_buffer``. As in Reverb ``inserts`` and ``samples`` count from the beginning, whatever became of the groups.

The limiter answers; who waits is its caller's affair. In the learner nobody polls it: a step that may not sample waits
for the next arrival, with a deadline (``learner.batcher``), and a group that may not go in fills the bounded hand-over
behind it, where the thread that reads the queue waits for room (``learner.hand_over``).
"""

import math
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, NonNegativeInt


class LimiterCounts(BaseModel):
    """What a limiter remembers; part of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    inserts: NonNegativeInt = 0
    samples: NonNegativeInt = 0
    deletes: NonNegativeInt = 0
    """Groups that left the queue, for whatever reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RateLimit:
    """What is to be kept.

    Raises:
        ValueError: no such ratio could be kept without both sides waiting for each other.
    """

    groups_per_sample: int
    """Groups that one sample takes at once; Reverb's is 1."""
    min_size: int
    """Groups in the queue before the first sample, at least ``groups_per_sample``."""
    samples_per_insert: float | None = None
    """How often a group is sampled on average; None keeps only ``min_size`` (Reverb's ``MinSize``)."""
    error_buffer: float = 0.0
    """Samples by which the ratio may be off before a side waits."""

    def __post_init__(self) -> None:
        if self.groups_per_sample < 1 or self.min_size < self.groups_per_sample:
            raise ValueError(
                f"min_size = {self.min_size} holds no sample of {self.groups_per_sample} groups: raise it to that"
            )
        if self.samples_per_insert is None:
            return
        if not self.samples_per_insert >= 1.0:
            raise ValueError(
                f"samples_per_insert = {self.samples_per_insert:g} is below 1: some groups would never be trained on"
            )
        # Both wait where max - samples_per_insert < error < min + groups_per_sample; this leaves no such error.
        least = max(self.groups_per_sample, self.samples_per_insert)
        if not self.error_buffer >= least:
            raise ValueError(
                f"error_buffer = {self.error_buffer:g} lets both sides wait for each other: raise it to {least:g} "
                "(groups of a step, or samples_per_insert)"
            )


class RateLimiter:
    """Counts inserts, samples and deletes, and says who may go on. Not thread-safe: its caller holds a lock."""

    def __init__(self, limit: RateLimit, counts: LimiterCounts | None = None) -> None:
        self._limit = limit
        counts = counts or LimiterCounts()
        self._inserts, self._samples, self._deletes = counts.inserts, counts.samples, counts.deletes

    @property
    def size(self) -> int:
        """Groups in the queue."""
        return self._inserts - self._deletes

    @property
    def error(self) -> float:
        """Samples that are owed (> 0) or ahead (< 0); 0 without a ratio."""
        per_insert = self._limit.samples_per_insert
        return 0.0 if per_insert is None else (self._inserts - self._limit.min_size) * per_insert - self._samples

    def can_insert(self) -> bool:
        """Whether one more group may go in."""
        return self.missing_samples() == 0

    def can_sample(self) -> bool:
        """Whether ``groups_per_sample`` groups may be taken."""
        return self.missing_inserts() == 0

    def missing_inserts(self) -> int:
        """Groups that must go in before a sample may be taken."""
        limit, below_size = self._limit, max(0, self._limit.min_size - self.size)
        if limit.samples_per_insert is None:
            return below_size
        missing = -limit.error_buffer + limit.groups_per_sample - self.error
        return max(below_size, math.ceil(missing / limit.samples_per_insert))

    def missing_samples(self) -> int:
        """Samples of one group that must be taken before one more group may go in."""
        limit = self._limit
        if limit.samples_per_insert is None or self.size < limit.min_size:
            return 0
        return max(0, math.ceil(self.error + limit.samples_per_insert - limit.error_buffer))

    def inserted(self) -> None:
        """One group went in."""
        self._inserts += 1

    def sampled(self) -> None:
        """One sample of ``groups_per_sample`` groups was taken."""
        self._samples += self._limit.groups_per_sample

    def deleted(self) -> None:
        """One group left."""
        self._deletes += 1

    def counts(self) -> LimiterCounts:
        """For the checkpoint."""
        return LimiterCounts(inserts=self._inserts, samples=self._samples, deletes=self._deletes)
