"""Shows progress: a live panel on a terminal, a plain line now and then elsewhere."""

import math
from types import TracebackType
from typing import Protocol, Self

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lambdapo_async.cli.progress import Progress
from lambdapo_async.report.numbers import number, percent

_STEPS_PER_LINE = 5
_SECONDS_PER_LINE = 10.0
"""Before the first step."""
_BAR_WIDTH = 40


class ProgressView(Protocol):
    """Where progress is shown."""

    def show(self, progress: Progress) -> None:
        """Show the newest state; called several times a second."""

    def say(self, text: str) -> None:
        """Show one line that stays."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_view(console: Console) -> ProgressView:
    """The view that suits the console."""
    return LiveView(console) if console.is_terminal else PlainView(console)


class PlainView:
    """One line every few steps and at every evaluation."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: tuple[float, int, str] | None = None

    def show(self, progress: Progress) -> None:
        """Write a line when an evaluation or the next few steps have come, or the start takes its time."""
        waited = progress.elapsed_s // _SECONDS_PER_LINE if progress.step == 0 else 0.0
        # the reward as text, because NaN is not equal to itself
        state = (waited, progress.step // _STEPS_PER_LINE, f"{progress.heldout:.4f}")
        if state != self._shown:
            self._shown = state
            self.say(status_line(progress))

    def say(self, text: str) -> None:
        """Write the line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class LiveView:
    """A panel that is redrawn in place; lines that are said stay above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def show(self, progress: Progress) -> None:
        """Redraw."""
        self._live.update(_panel(progress), refresh=True)

    def say(self, text: str) -> None:
        """Write the line above the panel."""
        self._console.print(text, markup=False, highlight=False)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()


def status_line(progress: Progress) -> str:
    """Everything on one line, for logs."""
    head = f"[{progress.elapsed_s:4.0f} s]"
    if progress.step == 0:
        return f"{head} {progress.phase}; {progress.actors_alive} actors; held-out reward {number(progress.heldout)}"
    return (
        f"{head} step {progress.step:3d}  held-out {number(progress.heldout)}"
        f"  train {number(progress.metric('reward/mean'))}"
        f"  staleness {number(progress.metric('staleness/mean'), 1)}"
        f"  queue {number(progress.metric('queue/groups'), 0)}"
        f"  tokens/s learner {number(progress.metric('speed/tokens_per_s'), 0)}"
        f" actors {progress.actor_tokens_per_s:,.0f}  actors {progress.actors_alive}"
    )


def _panel(progress: Progress) -> Group:
    bars = Table.grid(padding=(0, 1))
    bars.add_row("step", _bar(progress.step, progress.num_steps), f"{progress.step} of {progress.num_steps} at most")
    bars.add_row("held-out reward", _bar(progress.heldout, progress.target), _towards(progress))
    bars.add_row("train reward", _bar(progress.metric("reward/mean"), 1.0), number(progress.metric("reward/mean")))
    return Group(Text(f"{progress.elapsed_s:.0f} s  {progress.phase}", style="bold"), bars, _numbers(progress))


def _numbers(progress: Progress) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for column in (
        "staleness",
        "queue",
        "learner tokens/s",
        "idle",
        "actor tokens/s",
        "idle",
        "mismatch",
        "actors alive",
    ):
        table.add_column(column, justify="right")
    table.add_row(
        f"{number(progress.metric('staleness/mean'), 1)} (max {number(progress.metric('staleness/max'), 0)})",
        number(progress.metric("queue/groups"), 0),
        number(progress.metric("speed/tokens_per_s"), 0),
        percent(progress.metric("speed/idle_share")),
        f"{progress.actor_tokens_per_s:,.0f}",
        percent(progress.metric("actors/idle_share")),
        number(progress.metric("actors/mismatch_max"), 4),
        _alive(progress),
    )
    return table


def _alive(progress: Progress) -> str:
    aside = progress.metric("actors/quarantined")
    return f"{progress.actors_alive} ({aside:.0f} set aside)" if aside > 0 else str(progress.actors_alive)


def _bar(value: float, total: float) -> ProgressBar:
    return ProgressBar(total=total, completed=0.0 if math.isnan(value) else min(value, total), width=_BAR_WIDTH)


def _towards(progress: Progress) -> str:
    return f"{number(progress.heldout)} of {progress.target:g}, from {number(progress.heldout_start)}"
