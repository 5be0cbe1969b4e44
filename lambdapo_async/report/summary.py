"""The final numbers of a run, for the table at the end of the demo and of the report."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
    """Completion tokens trained, waiting included."""
    learner_idle_share: float
    actor_tokens_per_s: float
    """Completion tokens sampled, all actors, mean over steps."""
    actor_idle_share: float
    mismatch_fresh: float
    """Mean |log pi - log mu| at staleness 0, nats."""
    mismatch_kl: float
    staleness_mean: float
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
    return Summary(
        steps=steps[-1].step if steps else 0,
        heldout_start=heldout[0][1] if heldout else math.nan,
        heldout_end=heldout[-1][1] if heldout else math.nan,
        target=target,
        seconds=rows[-1].time - started_at if steps else 0.0,
        seconds_to_target=reached_at - started_at,
        learner_tokens_per_s=_per_second(steps, "tokens/trained"),
        learner_idle_share=_per_second(steps, "time/wait_s"),
        actor_tokens_per_s=_mean(steps, "actors/tokens_per_s"),
        actor_idle_share=_mean(steps, "actors/idle_share"),
        mismatch_fresh=_mean(steps, "mismatch/fresh"),
        mismatch_kl=_mean(steps, "mismatch_kl"),
        staleness_mean=_mean(steps, "staleness/mean"),
        staleness_max=max((value for _, value in series(steps, STEP, "staleness/max")), default=math.nan),
        groups_trained=_last(steps, "groups/trained"),
        groups_zero_variance=_last(steps, "groups/zero_variance"),
        groups_dropped_stale=_last(steps, "groups/dropped_stale"),
        actors_killed=sum(row.kind == EVENT and row.text.startswith(KILLED) for row in rows),
    )


def _per_second(steps: Sequence[MetricRow], name: str) -> float:
    """Sum over seconds, from the end of the first step to the end of the last."""
    elapsed_s = steps[-1].time - steps[0].time if steps else 0.0
    return sum(value for _, value in series(steps[1:], STEP, name)) / elapsed_s if elapsed_s > 0 else math.nan


def _mean(steps: Sequence[MetricRow], name: str) -> float:
    values = [value for _, value in series(steps, STEP, name)]
    return sum(values) / len(values) if values else math.nan


def _last(steps: Sequence[MetricRow], name: str) -> float:
    return next((value for _, value in series(steps[::-1], STEP, name)), math.nan)
