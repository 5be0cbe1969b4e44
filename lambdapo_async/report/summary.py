"""The final numbers of a run, for the table at the end of the demo and of the report."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from lambdapo_async.metrics import EVAL, EVENT, STEP, MetricRow, series
from lambdapo_async.report.numbers import number, percent

KILLED = "killed"
"""How the text of an event starts when an actor was killed on purpose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """NaN is not measured."""

    steps: int
    heldout_start: float
    heldout_end: float
    target: float | None
    seconds: float
    """From the start of the first step to the last row."""
    seconds_to_target: float
    """From the start of the first step to the evaluation that reached the target."""
    learner_tokens_per_s: float
    """Completion tokens trained, waiting included; the first step, which waits for the actors' start, is left out, as
    is the time between a suspension and the resumption."""
    learner_idle_share: float
    actor_tokens_per_s: float
    """Completion tokens sampled, all actors, mean over the steps' time."""
    actor_idle_share: float
    """Mean over the steps' time."""
    mismatch_fresh: float
    """Mean |log pi - log mu| of the tokens at staleness 0, nats."""
    mismatch_kl: float
    """Mean over the tokens."""
    staleness_mean: float
    """Mean over the groups."""
    staleness_max: float
    groups_trained: float
    groups_zero_variance: float
    groups_dropped_stale: float
    actors_killed: int

    @property
    def is_target_reached(self) -> bool:
        """Whether some evaluation was at the target."""
        return not math.isnan(self.seconds_to_target)

    def table(self) -> list[tuple[str, str]]:
        """(what, how much) for people."""
        target = "none" if self.target is None else f"{self.target:g}"
        took = f"after {self.seconds_to_target:.0f} s" if self.is_target_reached else "not reached"
        return [
            ("held-out reward", f"{number(self.heldout_start)} to {number(self.heldout_end)}"),
            ("target", f"{target}, {took} from the first step" if self.is_target_reached else f"{target}, {took}"),
            ("optimizer steps", f"{self.steps} in {self.seconds:.0f} s"),
            ("learner", f"{number(self.learner_tokens_per_s, 0)} tokens/s, idle {percent(self.learner_idle_share)}"),
            ("actors", f"{number(self.actor_tokens_per_s, 0)} tokens/s, idle {percent(self.actor_idle_share)}"),
            ("staleness", f"mean {number(self.staleness_mean, 1)}, max {number(self.staleness_max, 0)} versions"),
            ("mismatch at staleness 0", f"{number(self.mismatch_fresh, 4)} nats mean"),
            ("KL(mu || pi)", f"{number(self.mismatch_kl, 5)} nats per token"),
            (
                "groups",
                f"{number(self.groups_trained, 0)} trained, {number(self.groups_zero_variance, 0)} without variance, "
                f"{number(self.groups_dropped_stale, 0)} too stale",
            ),
            ("actors killed", str(self.actors_killed)),
        ]


def summarise(rows: Sequence[MetricRow], *, target: float | None) -> Summary:
    """Reduce a run's rows."""
    steps = [row for row in rows if row.kind == STEP]
    heldout = list(series(rows, EVAL, "eval/reward"))
    started_at = steps[0].time - steps[0].values.get("time/step_s", 0.0) if steps else math.nan
    reached_at = next((row.time for row, value in heldout if target is not None and value >= target), math.nan)
    tokens, seconds = [row.values.get("tokens/trained", math.nan) for row in steps], [_seconds(row) for row in steps]
    fresh = [each * row.values.get("mismatch/fresh_share", math.nan) for each, row in zip(tokens, steps, strict=True)]
    return Summary(
        steps=steps[-1].step if steps else 0,
        heldout_start=heldout[0][1] if heldout else math.nan,
        heldout_end=heldout[-1][1] if heldout else math.nan,
        target=target,
        seconds=rows[-1].time - started_at if steps else 0.0,
        seconds_to_target=reached_at - started_at,
        learner_tokens_per_s=_mean(steps[1:], "speed/tokens_per_s", seconds[1:]),
        learner_idle_share=_mean(steps[1:], "speed/idle_share", seconds[1:]),
        actor_tokens_per_s=_mean(steps, "actors/tokens_per_s", seconds),
        actor_idle_share=_mean(steps, "actors/idle_share", seconds),
        mismatch_fresh=_mean(steps, "mismatch/fresh", fresh),
        mismatch_kl=_mean(steps, "mismatch_kl", tokens),
        staleness_mean=_mean(steps, "staleness/mean", _groups(steps)),
        staleness_max=max((value for _, value in series(steps, STEP, "staleness/max")), default=math.nan),
        groups_trained=_last(steps, "groups/trained"),
        groups_zero_variance=_last(steps, "groups/zero_variance"),
        groups_dropped_stale=_last(steps, "groups/dropped_stale"),
        actors_killed=sum(row.kind == EVENT and row.text.startswith(KILLED) for row in rows),
    )


def _seconds(row: MetricRow) -> float:
    """How long the step took, waiting included: what its speed was reckoned from."""
    speed = row.values.get("speed/tokens_per_s", math.nan)
    return row.values.get("tokens/trained", math.nan) / speed if speed > 0 else math.nan


def _groups(steps: Sequence[MetricRow]) -> list[float]:
    """How many groups each step trained on."""
    totals = [0.0, *(row.values.get("groups/trained", math.nan) for row in steps)]
    return [after - before for before, after in pairwise(totals)]


def _mean(steps: Sequence[MetricRow], name: str, weights: Iterable[float]) -> float:
    """Mean of the steps that have the metric, each with its weight; NaN where none has."""
    pairs = [(row.values.get(name, math.nan), weight) for row, weight in zip(steps, weights, strict=True)]
    known = [(value, weight) for value, weight in pairs if math.isfinite(value) and math.isfinite(weight)]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total > 0 else math.nan


def _last(steps: Sequence[MetricRow], name: str) -> float:
    return next((value for _, value in series(steps[::-1], STEP, name)), math.nan)
