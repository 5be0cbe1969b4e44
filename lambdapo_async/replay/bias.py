"""Whether what is trained on still looks like what was sampled.

Dropping stale groups starves long and hard prompts: they take longest. The meter compares both by length and
difficulty, and counts what was dropped by reason and by length bucket.
"""

from collections import Counter
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, NonNegativeInt


@dataclass(frozen=True, slots=True)
class GroupShape:
    """What the meter looks at."""

    length: int
    """Tokens of the group's longest completion: what its sampling time follows."""
    difficulty: float
    """1 - mean verifiable reward of the group, in the reward's own units."""

    @property
    def bucket(self) -> int:
        """Upper edge of the length's bucket: the smallest power of two that is not below it; 0 for empty ones."""
        return 1 << (self.length - 1).bit_length() if self.length > 0 else 0


class BiasTally(BaseModel):
    """Sums over groups; a group that was trained on twice counts twice."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    groups: NonNegativeInt = 0
    length: NonNegativeInt = 0
    difficulty: float = 0.0

    def plus(self, shape: GroupShape) -> "BiasTally":
        """With one more group."""
        return BiasTally(
            groups=self.groups + 1, length=self.length + shape.length, difficulty=self.difficulty + shape.difficulty
        )

    @property
    def mean_length(self) -> float:
        """Tokens; NaN without a group."""
        return self.length / self.groups if self.groups else float("nan")

    @property
    def mean_difficulty(self) -> float:
        """NaN without a group."""
        return self.difficulty / self.groups if self.groups else float("nan")


class BiasState(BaseModel):
    """What a meter remembers; part of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    generated: BiasTally = BiasTally()
    trained: BiasTally = BiasTally()
    dropped: dict[str, dict[int, NonNegativeInt]] = {}
    """reason -> length bucket -> groups"""


class BiasMeter:
    """Counts groups over a whole run."""

    def __init__(self, state: BiasState | None = None) -> None:
        state = state or BiasState()
        self._generated, self._trained = state.generated, state.trained
        self._dropped = {reason: Counter(buckets) for reason, buckets in state.dropped.items()}

    def generated(self, shape: GroupShape) -> None:
        """A group arrived."""
        self._generated = self._generated.plus(shape)

    def trained(self, shape: GroupShape) -> None:
        """A group was part of a step."""
        self._trained = self._trained.plus(shape)

    def dropped(self, reason: str, shape: GroupShape) -> None:
        """A group was given up without ever having been trained on."""
        self._dropped.setdefault(reason, Counter())[shape.bucket] += 1

    def dropped_by_length(self, reason: str) -> dict[int, int]:
        """Length bucket -> groups, short ones first."""
        return dict(sorted(self._dropped.get(reason, Counter()).items()))

    @property
    def length_ratio(self) -> float:
        """Mean length of trained over generated groups: below 1, long ones are starved; NaN before either."""
        length = self._generated.mean_length
        return self._trained.mean_length / length if length else float("nan")

    @property
    def difficulty_gap(self) -> float:
        """Mean difficulty of trained minus generated groups: below 0, hard ones are starved; NaN before either."""
        return self._trained.mean_difficulty - self._generated.mean_difficulty

    def state(self) -> BiasState:
        """For the checkpoint."""
        dropped = {reason: self.dropped_by_length(reason) for reason in self._dropped}
        return BiasState(generated=self._generated, trained=self._trained, dropped=dropped)
