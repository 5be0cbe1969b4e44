"""The groups that may be trained on: bounded, group-atomic, and the same after a crash.

What a batch is made of depends only on the order of the calls (``advance``, ``offer``, ``sample``), never on time
or on how a group travelled. The journal keeps that order, so a checkpoint stores numbers and counts alone.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt

from lambdapo_async.replay.bias import GroupShape
from lambdapo_async.replay.limits import ReplayError, ReplayLimits
from lambdapo_async.replay.priority import log_weights, weighted_order
from lambdapo_async.replay.rate_limiter import LimiterCounts, RateLimiter

Item = TypeVar("Item")
DropReason = Literal["exhausted", "stale", "evicted", "too_large"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReplayEntry(Generic[Item]):
    """A group and what its fate depends on."""

    number: int
    """Of its journal record: its name, rising in order of arrival."""
    min_version: int
    """Oldest policy version that produced any of its tokens."""
    num_bytes: int
    """What it counts against ``max_bytes``."""
    mass: float
    """Sum of |advantage| over its rollouts."""
    shape: GroupShape
    item: Item
    """What is trained on."""


@dataclass(frozen=True, slots=True)
class Drop:
    """A group that left the queue."""

    number: int
    reason: DropReason
    uses: int
    """Steps that trained on it."""
    shape: GroupShape


class ReplaySnapshot(BaseModel):
    """The queue without its groups, which are in the journal; part of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    uses: dict[PositiveInt, NonNegativeInt] = {}
    """Record number -> steps that trained on the group, in order of arrival."""
    version: int = 0
    num_draws: NonNegativeInt = 0
    """Batches taken: with the seed, the whole state of the random generator."""
    last_number: NonNegativeInt = 0
    """Newest record that went in."""
    consumed: NonNegativeInt = 0
    dropped: dict[DropReason, NonNegativeInt] = {}
    limiter: LimiterCounts = LimiterCounts()


class ReplayQueue(Generic[Item]):
    """Holds groups until they were used up, grew stale, or made room. Not thread-safe: the learner's loop owns it."""

    def __init__(
        self,
        limits: ReplayLimits,
        snapshot: ReplaySnapshot | None = None,
        members: Iterable[ReplayEntry[Item]] = (),
    ) -> None:
        """A new queue, or the one of ``snapshot`` with its ``members``, in any order, as the journal holds them.

        Raises:
            ReplayError: a member is missing.
        """
        snapshot = snapshot or ReplaySnapshot()
        self._limits, self._version, self._num_draws = limits, snapshot.version, snapshot.num_draws
        self._limiter = RateLimiter(limits.rate, snapshot.limiter)
        self._uses = dict(snapshot.uses)
        self._entries = {entry.number: entry for entry in members}
        if missing := self._uses.keys() - self._entries.keys():
            raise ReplayError(
                f"{len(missing)} of {len(self._uses)} groups of the checkpoint's replay queue are not in the journal "
                f"(record {min(missing)} is the first): restore its segments"
            )
        self._entries = dict(sorted(self._entries.items()))
        self._last_number, self._consumed = snapshot.last_number, snapshot.consumed
        self._dropped = Counter(snapshot.dropped)
        self._drops: list[Drop] = []
        self._num_bytes = sum(entry.num_bytes for entry in self._entries.values())
        self._is_full = False

    @property
    def num_groups(self) -> int:
        """Groups in the queue."""
        return len(self._entries)

    @property
    def num_bytes(self) -> int:
        """Bytes of the groups in the queue."""
        return self._num_bytes

    @property
    def consumed(self) -> int:
        """Groups that no longer count as under way: what opens the admission gate.

        A plain stream consumes a group when it is first trained on or dropped, so that the gate bounds its
        staleness. With reuse it is consumed when it goes in: from then on age decay and ``drop_above`` bound the
        staleness, and a queue full of waiting groups can never hold the gate shut.
        """
        return self._consumed

    @property
    def dropped(self) -> dict[DropReason, int]:
        """Groups that left, by reason, over the whole run."""
        return dict(self._dropped)

    @property
    def rate_error(self) -> float:
        """Samples owed (> 0) or ahead (< 0)."""
        return self._limiter.error

    def missing_inserts(self) -> int:
        """Groups that must go in before the next batch, at least: what a waiting learner says."""
        return 0 if self.can_sample() else self._limiter.missing_inserts()

    def advance(self, version: int) -> None:
        """The policy is at ``version`` now: what is too old for it goes.

        Raises:
            ReplayError: versions never fall.
        """
        if version < self._version:
            raise ReplayError(f"version {version} follows {self._version}: versions never fall")
        self._version = version
        for entry in [entry for entry in self._entries.values() if self._is_stale(entry)]:
            self._remove(entry, "stale")

    def offer(self, entry: ReplayEntry[Item]) -> bool:
        """Whether ``entry`` was dealt with: it went in, or was dropped, counted.

        After False it must be offered again, before any other, when a batch was taken; one can be then.

        Raises:
            ReplayError: ``max_bytes`` is full of groups nothing was trained on, and too few of them for a step.
        """
        if entry.number <= self._last_number:
            raise ReplayError(f"record {entry.number} is offered after {self._last_number}: it was dealt with before")
        if self._is_stale(entry) or entry.num_bytes > self._limits.max_bytes:
            self._consumed += 1
            self._last_number = entry.number
            self._note_drop(entry, "stale" if self._is_stale(entry) else "too_large", uses=0)
            return True
        if not self._limiter.can_insert() or not self._make_room(entry):
            return False
        self._insert(entry)
        return True

    def can_sample(self) -> bool:
        """Whether a batch can be taken. A full queue overrules the ratio: it could not go on otherwise."""
        return self._is_full or self._limiter.can_sample()

    def sample(self) -> list[ReplayEntry[Item]]:
        """Take the groups of a step, none twice; ``ReplayError`` unless :meth:`can_sample`."""
        if not self.can_sample():
            raise ReplayError(
                f"the replay queue holds {self.num_groups} groups and {self.missing_inserts()} more are needed"
            )
        numbers = list(self._entries)
        if self._limits.max_uses > 1:
            numbers = [numbers[position] for position in self._draw_order()]
        return self.take(numbers[: self._limits.rate.groups_per_sample])

    def take(self, numbers: Sequence[int]) -> list[ReplayEntry[Item]]:
        """Take just these groups, as a journaled step did.

        Raises:
            ReplayError: one is not in the queue, or named twice: this is not the queue the step was chosen from.
        """
        unknown = [number for number in numbers if number not in self._entries]
        if unknown or len(set(numbers)) < len(numbers):
            raise ReplayError(
                f"the journal's step took {list(numbers)!s:.200}, of which {unknown!s:.200} are not in the replay "
                "queue: resume with the replay and staleness settings of the recorded run"
            )
        taken = [self._entries[number] for number in numbers]
        for entry in taken:
            self._use(entry)
        self._num_draws += 1
        self._limiter.sampled()
        self._is_full = False
        return taken

    def take_drops(self) -> list[Drop]:
        """What left the queue since the last call, in order."""
        drops, self._drops = self._drops, []
        return drops

    def snapshot(self) -> ReplaySnapshot:
        """For a checkpoint; take the drops first, they are not part of it."""
        return ReplaySnapshot(
            uses=self._uses,
            version=self._version,
            num_draws=self._num_draws,
            last_number=self._last_number,
            consumed=self._consumed,
            dropped=self.dropped,
            limiter=self._limiter.counts(),
        )

    def oldest_number(self) -> int:
        """Record from which the journal must be kept to rebuild the queue."""
        return min(self._entries, default=self._last_number + 1)

    def _draw_order(self) -> Iterator[int]:
        """Positions in a random order; each batch has its own stream, so only their count need be remembered."""
        entries = list(self._entries.values())
        log_weight_B = log_weights(
            np.array([entry.mass for entry in entries]),
            np.array([self._version - entry.min_version for entry in entries]),
            half_life=self._limits.half_life,
        )
        rng = np.random.default_rng([self._limits.seed, self._num_draws])
        return (int(position) for position in weighted_order(log_weight_B, rng))

    def _use(self, entry: ReplayEntry[Item]) -> None:
        self._uses[entry.number] += 1
        if self._limits.max_uses == 1:
            self._consumed += 1
        if self._uses[entry.number] == self._limits.max_uses:
            self._remove(entry, "exhausted")

    def _make_room(self, entry: ReplayEntry[Item]) -> bool:
        """Evict what was used most, then what is oldest, until ``entry`` fits; never what nothing was trained on."""
        if self._fits(entry, self.num_groups, self._num_bytes):
            return True
        used = [held for held in self._entries.values() if self._uses[held.number] > 0]
        used.sort(key=lambda held: (-self._uses[held.number], held.min_version, held.number))
        num_groups, num_bytes = self.num_groups, self._num_bytes
        for i, victim in enumerate(used):
            num_groups, num_bytes = num_groups - 1, num_bytes - victim.num_bytes
            if self._fits(entry, num_groups, num_bytes):
                for evicted in used[: i + 1]:
                    self._remove(evicted, "evicted")
                return True
        self._refuse()
        return False

    def _refuse(self) -> None:
        wanted = self._limits.rate.groups_per_sample
        if self.num_groups < wanted:
            raise ReplayError(
                f"replay.max_bytes = {self._limits.max_bytes} is full with {self.num_groups} groups ({self._num_bytes} "
                f"bytes), a step needs {wanted}: raise it, or shorten completions"
            )
        self._is_full = True

    def _fits(self, entry: ReplayEntry[Item], num_groups: int, num_bytes: int) -> bool:
        return num_groups < self._limits.max_groups and num_bytes + entry.num_bytes <= self._limits.max_bytes

    def _insert(self, entry: ReplayEntry[Item]) -> None:
        self._entries[entry.number] = entry
        self._uses[entry.number] = 0
        self._num_bytes += entry.num_bytes
        self._last_number = entry.number
        self._limiter.inserted()
        if self._limits.max_uses > 1:
            self._consumed += 1

    def _remove(self, entry: ReplayEntry[Item], reason: DropReason) -> None:
        del self._entries[entry.number]
        uses = self._uses.pop(entry.number)
        self._num_bytes -= entry.num_bytes
        self._limiter.deleted()
        self._is_full = False
        if uses == 0 and self._limits.max_uses == 1:
            self._consumed += 1
        self._note_drop(entry, reason, uses)

    def _note_drop(self, entry: ReplayEntry[Item], reason: DropReason, uses: int) -> None:
        self._dropped[reason] += 1
        self._drops.append(Drop(entry.number, reason, uses, entry.shape))

    def _is_stale(self, entry: ReplayEntry[Item]) -> bool:
        return self._version - entry.min_version > self._limits.drop_above
