"""How many groups an actor holds: as many as keep its engine full, and no more than it answers in time.

A group's time in an actor grows with the number held (Little's law: held = rate * time). So with h groups held and t
seconds from lease to delivery, h / t groups are answered per second, and h / t * T groups within T seconds. T is the
time in which a group must be delivered not to become stale: while ``max_staleness + 1`` versions are made. Summed over
a fleet that is the admission gate's capacity, shared out by speed: no actor needs to know of the others.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from lambdapo_async.config import RunConfig
from lambdapo_async.rollout import Lease

FLOOR = 1
"""Groups that the slowest actor holds."""
HEADROOM = 1.5
"""Above the fair share of the gate's capacity, so that chance leaves none of it unused."""
_NEWEST = 0.2
"""Weight of the newest group, and of the newest version, in the running means."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldLimits:
    """What bounds the number of groups held, whatever the speed."""

    most: int
    """``actor.max_groups_in_flight``."""
    engine_groups: int
    """Groups whose samples the engine runs at once."""
    longest_s: float
    """Half of the time in which the engine must have sampled a group."""
    versions: int
    """Versions while a group may be on its way: ``staleness.max_staleness + 1`` steps' worth of groups, each of which
    makes as many versions as it is used."""

    @classmethod
    def of(cls, config: RunConfig) -> Self:
        """The limits that ``config`` asks for."""
        return cls(
            most=config.actor.max_groups_in_flight,
            engine_groups=math.ceil(config.actor.max_num_seqs / config.rollout.group_size),
            longest_s=config.actor.group_timeout_s / 2,
            versions=(config.staleness.max_staleness + 1) * config.replay.max_uses,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Running means over the last groups."""

    held: float
    """Groups held during the life of a group."""
    group_s: float
    """Seconds from lease to delivery."""
    sampling_s: float
    """Of which in the engine."""
    fill: float
    """Mean length of a group's samples over the longest: the share of its places that a group uses."""

    def towards(self, newest: Self) -> "Speed":
        """The means with one more group."""
        return Speed(
            held=_mean(self.held, newest.held),
            group_s=_mean(self.group_s, newest.group_s),
            sampling_s=_mean(self.sampling_s, newest.sampling_s),
            fill=_mean(self.fill, newest.fill),
        )


def groups_to_hold(speed: Speed | None, limits: HoldLimits, *, version_s: float) -> int:
    """How many groups an actor of this speed should hold.

    Args:
        speed: None before the first group: then as many as the engine runs at once.
        version_s: seconds between two versions of the policy; infinite while they are not known.
    """
    if speed is None:
        return _between(limits.engine_groups, limits)
    # Some are being rewarded or sent, and short samples leave their places early: one more than fills the rest.
    fills = limits.engine_groups / speed.fill * speed.group_s / speed.sampling_s + 1
    longest_s = min(limits.longest_s, HEADROOM * limits.versions * version_s)
    return _between(min(fills, speed.held / speed.group_s * longest_s), limits)


def _between(wanted: float, limits: HoldLimits) -> int:
    return max(FLOOR, min(limits.most, math.floor(wanted)))


def _mean(before: float, newest: float) -> float:
    return before + _NEWEST * (newest - before)


class Holding:
    """Watches the groups of one actor; all times are seconds of one clock that never goes back."""

    def __init__(self, limits: HoldLimits) -> None:
        self._limits = limits
        self._speed: Speed | None = None
        self._begun: dict[Lease, tuple[float, float]] = {}
        self._sampled: dict[Lease, Speed] = {}
        self._held_s = 0.0
        self._at: float | None = None
        self._version: tuple[int, float] | None = None
        self._version_s = math.inf

    def target(self, now: float) -> int:
        """Groups to hold now."""
        version_s = self._version_s
        if self._version is not None and math.isfinite(version_s):
            version_s = max(version_s, now - self._version[1])
        return groups_to_hold(self._speed, self._limits, version_s=version_s)

    def saw_version(self, version: int, now: float) -> None:
        """The engine's version: its pace says how soon a group becomes stale."""
        if version < 0:
            return
        if self._version is None or version < self._version[0]:
            self._version = version, now
        elif version > self._version[0]:
            elapsed_s = (now - self._version[1]) / (version - self._version[0])
            self._version_s = elapsed_s if math.isinf(self._version_s) else _mean(self._version_s, elapsed_s)
            self._version = version, now

    def leased(self, lease: Lease, now: float) -> None:
        """A group begins."""
        self._settle(now)
        self._begun[lease] = now, self._held_s

    def sampled(self, lease: Lease, lengths: Sequence[int], *, sampling_s: float) -> None:
        """The engine returned a group's samples, of so many tokens each, after so many seconds."""
        fill = sum(lengths) / max(1, len(lengths) * max(lengths))
        self._sampled[lease] = Speed(held=0.0, group_s=0.0, sampling_s=max(sampling_s, 1e-6), fill=max(fill, 1e-3))

    def ended(self, lease: Lease, now: float, *, is_delivered: bool) -> None:
        """A group left the actor; only those that were delivered say how fast it is."""
        self._settle(now)
        begun_at, held_s = self._begun.pop(lease)
        sampled = self._sampled.pop(lease, None)
        life_s = now - begun_at
        # A held-out prompt has one sample: it says nothing of groups.
        if not is_delivered or sampled is None or life_s <= 0 or lease.split != "train":
            return
        newest = Speed(
            held=(self._held_s - held_s) / life_s, group_s=life_s, sampling_s=sampled.sampling_s, fill=sampled.fill
        )
        self._speed = newest if self._speed is None else self._speed.towards(newest)

    def _settle(self, now: float) -> None:
        """Add up group seconds until now."""
        if self._at is not None:
            self._held_s += len(self._begun) * (now - self._at)
        self._at = now
