"""Which files lead from what an actor has to the head with the fewest bytes."""

from collections.abc import Iterable
from dataclasses import dataclass

from lambdapo_async.errors import WeightsError, WeightsLostError


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Available:
    """One file that can be fetched, in the words of its metadata."""

    version: int
    """Where it leads to."""
    num_bytes: int
    """On the wire."""
    base_version: int | None = None
    """What it was made from; None for a full version, which needs no base."""
    base_min: int | None = None
    """Union files only: any base in [base_min, version) will do."""

    def bases(self) -> range | None:
        """The versions it can be applied to; None if it needs no base."""
        if self.base_version is None:
            return None
        if self.base_min is None:
            return range(self.base_version, self.base_version + 1)
        return range(self.base_min, self.version)


@dataclass(frozen=True, slots=True)
class Plan:
    """Files to fetch and apply, in this order."""

    files: tuple[Available, ...]

    @property
    def num_bytes(self) -> int:
        """On the wire."""
        return sum(file.num_bytes for file in self.files)

    @property
    def cost(self) -> tuple[int, int]:
        """Bytes, and of equal bytes the number of files."""
        return self.num_bytes, len(self.files)

    def then(self, file: Available) -> "Plan":
        """This plan and one more file."""
        return Plan((*self.files, file))


def plan_catch_up(files: Iterable[Available], *, at: int | None, head: int) -> Plan:
    """The plan with the fewest bytes from version ``at`` to ``head``, of all that ``files`` allow.

    It is a chain of steps, a union and the steps after it, or a keyframe, its union and the steps after it.

    Args:
        files: what can be fetched now.
        at: version of the actor's mirror; None if it has none.
        head: newest published version, at least ``at``.

    Raises:
        WeightsError: the head is older than the mirror.
        WeightsLostError: nothing leads there: a file that did is not among ``files`` any more.
    """
    if at is not None and head < at:
        raise WeightsError(f"the head is version {head}, older than the mirror's {at}: another learner's run?")
    best: dict[int, Plan] = {} if at is None else {at: Plan(())}
    # A file leads only to versions above its bases, so by the time a version's files are seen its bases are settled.
    for file in sorted(files, key=lambda file: file.version):
        if file.version > head:
            continue
        bases = file.bases()
        starts = [Plan(())] if bases is None else [best[base] for base in bases if base in best]
        candidates = [start.then(file) for start in starts]
        known = [best[file.version]] if file.version in best else []
        if candidates or known:
            best[file.version] = min([*known, *candidates], key=lambda plan: plan.cost)
    if head not in best:
        raise WeightsLostError(f"nothing published leads from {at} to version {head}: a keyframe is missing")
    return best[head]
