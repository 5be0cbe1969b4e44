"""What of a step's metrics says that training is going wrong, in sentences that say what to change.

=====================  ===================================================================================
``ess_token``          effective sample size of the token ratios below 0.3 of the tokens
``ess_sequence``       the same over sequences
``masked``             more than 10 % of the tokens masked or rejected
``negative_shift``     mean advantage below 0 while groups are stale
``density_not_value``  over 20 steps the mean density rose and the mean verifiable reward did not
=====================  ===================================================================================
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

MIN_ESS = 0.3
MAX_MASKED = 0.1
MIN_SHIFT = -1e-6
"""Rounding leaves a centred advantage with a mean of this order."""
TREND_STEPS = 20
"""Steps that are compared with as many before them."""
MIN_DENSITY_RISE = 0.02

NAMES = ("ess_token", "ess_sequence", "masked", "negative_shift", "density_not_value")

_MASKED = ("ratio/masked_pos", "ratio/masked_neg", "ratio/rejected_pos", "ratio/rejected_neg")


@dataclass(frozen=True, slots=True)
class AlarmState:
    """The alarms of one step."""

    active: Mapping[str, str]
    """Name -> sentence of every alarm that sounds."""
    raised: tuple[str, ...]
    """Sentences of those that did not sound at the step before: worth a warning."""

    @property
    def metrics(self) -> dict[str, float]:
        """``alarm/<name>`` -> 1 or 0, for every alarm there is."""
        return {f"alarm/{name}": float(name in self.active) for name in NAMES}


class Alarms:
    """Watches the metrics of consecutive steps; a metric that is absent alarms nobody."""

    def __init__(self) -> None:
        self._active: set[str] = set()
        self._rewards: deque[tuple[float, float]] = deque(maxlen=2 * TREND_STEPS)

    def check(self, metrics: Mapping[str, float]) -> AlarmState:
        """Take in one step's metrics: ``ratio/*``, ``advantage/shift``, ``staleness/max`` and ``reward/*``."""
        if "reward/density" in metrics and "reward/verifiable" in metrics:
            self._rewards.append((metrics["reward/density"], metrics["reward/verifiable"]))
        sentences = {
            "ess_token": _low_ess(metrics, "ratio/ess_token"),
            "ess_sequence": _low_ess(metrics, "ratio/ess_sequence"),
            "masked": _masked(metrics),
            "negative_shift": _negative_shift(metrics),
            "density_not_value": self._density_not_value(),
        }
        active = {name: sentence for name, sentence in sentences.items() if sentence is not None}
        state = AlarmState(
            active=active,
            raised=tuple(sentence for name, sentence in active.items() if name not in self._active),
        )
        self._active = set(active)
        return state

    def _density_not_value(self) -> str | None:
        if len(self._rewards) < 2 * TREND_STEPS:
            return None
        density, value = (
            sum(column[TREND_STEPS:]) / TREND_STEPS - sum(column[:TREND_STEPS]) / TREND_STEPS
            for column in zip(*self._rewards, strict=True)
        )
        if density < MIN_DENSITY_RISE or value > 0:
            return None
        return (
            f"reward/density rose by {density:.3f} over {TREND_STEPS} steps while reward/verifiable changed by "
            f"{value:.3f}: the policy imitates the reference without solving more; lower density.lam or set "
            'density.gate = "off"'
        )


def _low_ess(metrics: Mapping[str, float], name: str) -> str | None:
    if metrics.get(name, 1.0) >= MIN_ESS:
        return None
    return (
        f"{name} = {metrics[name]:.2f} is below {MIN_ESS}: few samples carry the gradient; "
        "lower staleness.max_staleness or learner.lr"
    )


def _masked(metrics: Mapping[str, float]) -> str | None:
    masked = sum(metrics.get(name, 0.0) for name in _MASKED)
    if masked <= MAX_MASKED:
        return None
    return (
        f"ratio/masked = {masked:.0%} of the tokens are masked or rejected, more than {MAX_MASKED:.0%}: "
        "lower staleness.max_staleness, or widen the bounds of objective.policy_loss"
    )


def _negative_shift(metrics: Mapping[str, float]) -> str | None:
    shift = metrics.get("advantage/shift", 0.0)
    if shift >= MIN_SHIFT or metrics.get("staleness/max", 0.0) <= 0:
        return None
    return (
        f"advantage/shift = {shift:.3f} is negative on stale data, which pushes probability away from what was "
        "sampled: set objective.advantage.center = true"
    )
