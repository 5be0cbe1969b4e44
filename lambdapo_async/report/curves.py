"""The report's curves as inline SVG that follows the page's light or dark colours."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lambdapo_async.metrics import EVAL, EVENT, STEP, MetricRow, series

_BLUE, _AMBER = "#3b82f6", "#f59e0b"
_INK = "#123457"
"""Stands for the page's text colour until the SVG is written."""
_STYLE = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
}
_UNMARKED = ("checkpoint", "alarm")


@dataclass(frozen=True, slots=True)
class Line:
    """One metric of a chart."""

    name: str
    label: str
    color: str
    kind: str = STEP


@dataclass(frozen=True, slots=True)
class Chart:
    """Metrics that are read together."""

    title: str
    lines: tuple[Line, ...]
    from_zero: bool = True


REWARD_CHART = Chart(
    "Reward",
    (
        Line("reward/mean", "training rollouts (R)", _AMBER),
        Line("eval/reward", "held-out (V)", _BLUE, EVAL),
    ),
    from_zero=False,
)
CHARTS = (
    Chart(
        "Staleness, versions",
        (Line("staleness/max", "maximum", _AMBER), Line("staleness/mean", "mean", _BLUE)),
    ),
    Chart(
        "Queue, groups",
        (Line("queue/groups", "in Redis", _AMBER), Line("queue/leased", "held by actors", _BLUE)),
    ),
    Chart(
        "Sampled in vain, so far",
        (Line("queue/expired", "leases expired", _AMBER), Line("queue/late", "groups refused as late", _BLUE)),
    ),
    Chart(
        "Throughput, tokens per second",
        (Line("actors/tokens_per_s", "actors", _AMBER), Line("speed/tokens_per_s", "learner", _BLUE)),
    ),
    Chart(
        "Idle share",
        (Line("actors/idle_share", "actors", _AMBER), Line("speed/idle_share", "learner", _BLUE)),
    ),
    Chart(
        "Mismatch, nats",
        (
            Line("mismatch_kl", "KL(mu || pi)", _AMBER),
            Line("mismatch/fresh", "mean |log pi - log mu| at staleness 0", _BLUE),
        ),
    ),
)


def marked_events(rows: Sequence[MetricRow]) -> list[MetricRow]:
    """The events that curves mark: what somebody did, not the routine of checkpoints."""
    return [row for row in rows if row.kind == EVENT and not row.text.startswith(_UNMARKED)]


def draw(chart: Chart, rows: Sequence[MetricRow], *, target: float | None = None, width: float = 4.6) -> str:
    """One chart over the steps.

    Args:
        chart: what to draw; a metric without values draws nothing.
        rows: the run's.
        target: drawn as a dashed line.
        width: inches at 72 per inch; the page scales it.

    Returns:
        An ``<svg>`` element.
    """
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": chart.title}):
        figure = Figure(figsize=(width, 2.5), layout="constrained")
        axes = figure.subplots()
        for line in chart.lines:
            _draw_line(axes, line, rows)
        if target is not None:
            axes.axhline(target, color=_INK, linewidth=0.8, linestyle="--", label="target")
        for number, event in enumerate(marked_events(rows), start=1):
            axes.axvline(event.step, color=_INK, linewidth=0.6, linestyle=":")
            axes.annotate(str(number), (event.step, 1.0), xycoords=("data", "axes fraction"), fontsize=8, ha="center")
        axes.set_xlabel("step")
        if chart.from_zero:
            axes.set_ylim(bottom=0.0)
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside upper left", ncols=3)
        return _svg(figure)


def _draw_line(axes: Axes, line: Line, rows: Sequence[MetricRow]) -> None:
    points = {row.step: value for row, value in series(rows, line.kind, line.name)}  # the last one of a step counts
    if points:
        steps = sorted(points)
        marker = "o" if line.kind == EVAL or len(steps) == 1 else ""
        values = [points[step] for step in steps]
        axes.plot(steps, values, color=line.color, label=line.label, marker=marker, markersize=4, linewidth=1.6)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")
