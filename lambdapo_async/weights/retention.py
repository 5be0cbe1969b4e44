"""Which published files may go: those that no plan would take, and within a byte budget the cheapest to miss."""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from lambdapo_async.errors import WeightsError
from lambdapo_async.weights.catch_up import Available


@dataclass(frozen=True, slots=True)
class Ranked:
    """Published files by what would be lost without them."""

    live: frozenset[Available]
    """The newest keyframe, its newest union and the steps after that: what leads from nothing to the head."""
    useful: frozenset[Available]
    """Steps up to the union that together take fewer bytes than it: cheaper for who is a little behind."""
    superseded: frozenset[Available]
    """What no plan to the head would take any more."""


def rank(files: Collection[Available]) -> Ranked:
    """Tell needed files from others."""
    keyframe = max((file for file in files if file.base_version is None), default=None, key=_version)
    if keyframe is None:
        return Ranked(frozenset(), frozenset(), frozenset(files))
    unions = [file for file in files if file.base_min is not None and file.base_min >= keyframe.version]
    union = max(unions, default=None, key=_version)
    steps = sorted((file for file in files if _is_step(file)), key=_version, reverse=True)
    covered = (union or keyframe).version
    live = {keyframe, *([union] if union else []), *(step for step in steps if step.version > covered)}
    useful, num_bytes = set[Available](), 0
    for step in steps:
        if union is None or not keyframe.version < step.version <= covered:
            continue
        num_bytes += step.num_bytes
        if num_bytes >= union.num_bytes:
            break
        useful.add(step)
    return Ranked(frozenset(live), frozenset(useful), frozenset(files) - live - useful)


def former_pair(superseded: Collection[Available]) -> frozenset[Available]:
    """Of superseded files those that somebody may be about to fetch: the newest keyframe and union, and steps since."""
    keyframe = max((file for file in superseded if file.base_version is None), default=None, key=_version)
    union = max((file for file in superseded if file.base_min is not None), default=None, key=_version)
    oldest = 0 if keyframe is None else keyframe.version
    steps = (file for file in superseded if _is_step(file) and file.version > oldest)
    return frozenset([*([keyframe] if keyframe else []), *([union] if union else []), *steps])


class Retention:
    """Decides before each publish what goes; remembers since when a file has been superseded."""

    def __init__(self, *, max_bytes: int | None, grace_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            max_bytes: of all files, those being published included; None where space is no matter.
            grace_s: seconds that a superseded file stays.
            clock: monotonic seconds.
        """
        self._max_bytes, self._grace_s, self._clock = max_bytes, grace_s, clock
        self._superseded_at: dict[Available, float] = {}

    def to_drop(self, files: Collection[Available], *, incoming_bytes: int) -> tuple[Available, ...]:
        """What must go before ``incoming_bytes`` more come: of the superseded what had its time, and what is too much.

        Raises:
            WeightsError: what nobody can do without and the new files do not fit together.
        """
        ranked, now = rank(files), self._clock()
        former = former_pair(ranked.superseded)
        self._superseded_at = {file: self._superseded_at.get(file, now) for file in former}
        stays = {file for file, since in self._superseded_at.items() if now - since < self._grace_s}
        dropped = [file for file in ranked.superseded if file not in stays]
        kept = [*stays, *ranked.useful]
        return (*dropped, *self._too_much(ranked.live, kept, incoming_bytes))

    def _too_much(
        self, live: Collection[Available], others: Collection[Available], incoming_bytes: int
    ) -> list[Available]:
        """Of ``others`` what exceeds the budget: oldest steps first, then the former keyframes and unions."""
        if self._max_bytes is None:
            return []
        needed = sum(file.num_bytes for file in live) + incoming_bytes
        if needed > self._max_bytes:
            raise WeightsError(
                f"weights.max_redis_bytes = {self._max_bytes} cannot hold the {needed - incoming_bytes} bytes that "
                f"lead to the head and {incoming_bytes} new ones: raise it to at least {needed}"
            )
        excess = needed + sum(file.num_bytes for file in others) - self._max_bytes
        dropped: list[Available] = []
        for file in sorted(others, key=lambda file: (not _is_step(file), file.version)):
            if excess <= 0:
                break
            dropped.append(file)
            excess -= file.num_bytes
        return dropped


def _version(file: Available) -> int:
    return file.version


def _is_step(file: Available) -> bool:
    return file.base_version is not None and file.base_min is None
