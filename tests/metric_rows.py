"""Histories of small runs, for tests of what reads them."""

from lambdapo_async.metrics import EVAL, EVENT, STEP, MetricRow


def step_row(step: int, time: float, **values: float) -> MetricRow:
    """A step; ``reward__mean=1`` stands for ``reward/mean``."""
    return MetricRow(STEP, step, time, {name.replace("__", "/"): value for name, value in values.items()})


def eval_row(step: int, time: float, reward: float) -> MetricRow:
    """A finished evaluation."""
    return MetricRow(EVAL, step, time, {"eval/reward": reward, "eval/num": 64.0})


def event_row(step: int, time: float, text: str) -> MetricRow:
    """A mark on the curves."""
    return MetricRow(EVENT, step, time, {}, text)
