"""What the learner knows of each actor from its groups, and the rule by which one is set aside.

An actor whose engine computes other log-probabilities than the learner trains on a policy that nobody asked for. At
staleness 0, context included, both have the same weights, so the k3 estimate of KL(mu || pi) over those tokens is the
engine's error alone. It depends on kernels and types, so an actor is held against the others, not against a constant.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

MISMATCH_FLOOR = 0.02
"""Nats per token that are never an outlier: 0.2 nats of difference in log-probability, ten times bfloat16's."""
MISMATCH_FACTOR = 10.0
"""An outlier is so many times above the median of all other actors."""
MIN_FRESH_TOKENS = 512
"""An actor is judged from so many tokens at staleness 0 on."""
KEPT_SHARE = 1.0 - 1.0 / 64
"""Of mismatch and truncation at each new group: an actor is what its last 64 groups were."""
MAX_ACTORS = 4096
"""Actors remembered; the one that was silent longest is forgotten first."""


@dataclass(frozen=True, slots=True)
class FreshTokens:
    """The tokens of a group that the learner's own version sampled, on a context of its own."""

    count: int
    k3_sum: float
    """Sum of k3 = pi/mu - 1 - log(pi/mu) over them, in nats."""
    gap_sum: float
    """Sum of |log pi - log mu| over them, in nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorHealth:
    """One actor; NaN where nothing is known."""

    mismatch: float
    """k3 estimate of KL(mu || pi) at staleness 0, nats per token."""
    acceptance: float
    """Share of its groups that were trained; those that wait for their step are not yet."""
    truncated: float
    """Share of its rollouts that ended at ``sampling.max_tokens``."""


class _Sums(NamedTuple):
    received: float = 0.0
    trained: float = 0.0
    rollouts: float = 0.0
    truncated: float = 0.0
    fresh_tokens: float = 0.0
    fresh_k3: float = 0.0


class FleetHealth:
    """Adds up what groups say of the actors that sent them."""

    def __init__(self) -> None:
        self._sums: OrderedDict[str, _Sums] = OrderedDict()

    def received(self, actor_id: str, *, num_rollouts: int, num_truncated: int) -> None:
        """A group came, whatever becomes of it; ``num_truncated`` rollouts ended at ``sampling.max_tokens``."""
        sums = self._take(actor_id)
        self._sums[actor_id] = sums._replace(
            received=sums.received + 1,
            rollouts=KEPT_SHARE * sums.rollouts + num_rollouts,
            truncated=KEPT_SHARE * sums.truncated + num_truncated,
        )

    def trained(self, actor_id: str, fresh: FreshTokens) -> None:
        """A group was trained on."""
        sums = self._take(actor_id)
        self._sums[actor_id] = sums._replace(
            trained=sums.trained + 1,
            fresh_tokens=KEPT_SHARE * sums.fresh_tokens + fresh.count,
            fresh_k3=KEPT_SHARE * sums.fresh_k3 + fresh.k3_sum,
        )

    def forget(self, actor_id: str) -> None:
        """Begin anew with an actor: what it was says nothing of what it is."""
        self._sums.pop(actor_id, None)

    def actors(self) -> dict[str, ActorHealth]:
        """What is known of each."""
        return {
            actor_id: ActorHealth(
                mismatch=_share(sums.fresh_k3, sums.fresh_tokens),
                acceptance=_share(min(sums.trained, sums.received), sums.received),
                truncated=_share(sums.truncated, sums.rollouts),
            )
            for actor_id, sums in self._sums.items()
        }

    def outliers(self) -> list[str]:
        """Actors to be set aside; see :func:`outliers`."""
        judged = {
            actor_id: sums.fresh_k3 / sums.fresh_tokens
            for actor_id, sums in self._sums.items()
            if sums.fresh_tokens >= MIN_FRESH_TOKENS
        }
        return outliers(judged)

    def _take(self, actor_id: str) -> _Sums:
        """An actor's sums, which become the newest."""
        sums = self._sums.setdefault(actor_id, _Sums())
        self._sums.move_to_end(actor_id)
        if len(self._sums) > MAX_ACTORS:
            self._sums.popitem(last=False)
        return sums


def outliers(mismatch: Mapping[str, float]) -> list[str]:
    """Actors whose mismatch is above ``MISMATCH_FLOOR`` and ``MISMATCH_FACTOR`` times the median of all others.

    At most half of the fleet: where most are off, it is not the actors that are wrong. A single actor has nobody to be
    held against; its canary is all there is.
    """
    found = []
    for actor_id, value in mismatch.items():
        others = [each for other, each in mismatch.items() if other != actor_id and not math.isnan(each)]
        # NaN is above everything: a log-probability that is no number is nobody's policy.
        if others and not value <= max(MISMATCH_FLOOR, MISMATCH_FACTOR * median(others)):
            found.append(actor_id)
    return sorted(found) if 2 * len(found) <= len(mismatch) else []


def mismatch_metrics(fresh: Sequence[FreshTokens], *, num_tokens: int) -> dict[str, float]:
    """``mismatch/*`` of a step with ``num_tokens`` completion tokens, whatever their age; empty without any."""
    if num_tokens == 0:
        return {}
    count = sum(each.count for each in fresh)
    metrics = {"mismatch/fresh_share": count / num_tokens}
    return metrics if count == 0 else {**metrics, "mismatch/fresh": sum(each.gap_sum for each in fresh) / count}


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan
