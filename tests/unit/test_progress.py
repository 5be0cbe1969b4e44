import io
import math

import pytest
from rich.console import Console

from lambdapo_async.broker.heartbeat import Heartbeat
from lambdapo_async.cli.progress import Progress
from lambdapo_async.cli.progress_view import LiveView, PlainView, open_view, status_line
from tests.metric_rows import eval_row, event_row, step_row


class Clock:
    """Seconds that pass when told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def progress(clock) -> Progress:
    return Progress(num_steps=100, target=0.9, clock=clock)


def heartbeat(name: str, tokens: int) -> Heartbeat:
    return Heartbeat(
        actor_id=name, host="h", pid=1, state="sampling", device="cpu", dtype="bfloat16", engine="scripted",
        policy_version=1, groups_in_flight=1, groups_sent=1, completions=8, tokens=tokens, tokens_per_s=0.0,
        idle_share=0.0, sent_at=0.0,
    )  # fmt: skip


def test_half_way_is_the_middle_between_the_first_evaluation_and_the_target(progress):
    assert not progress.is_half_way
    for reward, half_way, reached in (
        (0.4, False, False),
        (0.64, False, False),
        (0.65, True, False),
        (0.9, True, True),
    ):
        progress.add(eval_row(1, 1.0, reward))
        assert (progress.is_half_way, progress.is_target_reached) == (half_way, reached)
    assert progress.heldout_start == 0.4


def test_the_newest_step_and_the_fleet_are_shown_on_one_line(progress, clock):
    progress.observe([heartbeat("a", 3000)])
    clock.now = 8.0
    progress.add(eval_row(0, 1.0, 0.4))
    progress.add(step_row(7, 2.0, reward__mean=0.5, staleness__mean=1.5, queue__groups=32, speed__tokens_per_s=4321))
    progress.add(event_row(7, 3.0, "checkpoint"))
    progress.observe([heartbeat("a", 11000), heartbeat("b", 4000)])
    line = status_line(progress)
    for part in ("8 s", "step   7", "held-out 0.400", "train 0.500", "staleness 1.5", "queue 32", "4,321", "1,500"):
        assert part in line
    assert line.endswith("actors 2")


def test_the_actors_rate_is_over_the_last_seconds_and_forgets_the_dead(progress, clock):
    for clock.now, fleet in (
        (0.0, [heartbeat("a", 0)]),
        (5.0, [heartbeat("a", 9000)]),
        (12.0, [heartbeat("a", 9000), heartbeat("b", 700)]),
    ):
        progress.observe(fleet)
    assert progress.actor_tokens_per_s == 100.0
    clock.now = 15.0
    progress.observe([heartbeat("b", 1700)])
    assert progress.actor_tokens_per_s == 170.0
    assert progress.actors_alive == 1


def test_what_is_not_known_is_a_dash(progress):
    assert math.isnan(progress.metric("reward/mean"))
    assert status_line(progress).endswith("held-out reward -")


def plain() -> tuple[PlainView, io.StringIO]:
    output = io.StringIO()
    return PlainView(Console(file=output, width=200)), output


def test_the_plain_view_writes_a_line_per_few_steps_and_per_evaluation(progress):
    view, output = plain()
    for step in range(1, 10):
        progress.add(step_row(step, float(step), reward__mean=0.5))
        view.show(progress)
        view.show(progress)
    assert output.getvalue().count("\n") == 2
    progress.add(eval_row(9, 10.0, 0.6))
    view.show(progress)
    assert output.getvalue().count("\n") == 3


def test_the_plain_view_shows_now_and_then_that_a_start_takes_long(progress, clock):
    view, output = plain()
    for clock.now in (0.0, 1.0, 9.0, 11.0, 12.0):
        progress.phase = f"line at {clock.now}"
        view.show(progress)
    assert output.getvalue().count("\n") == 2


def test_the_live_view_draws_a_panel_and_keeps_what_is_said(progress):
    output = io.StringIO()
    console = Console(file=output, width=100, force_terminal=True)
    view = open_view(console)
    assert isinstance(view, LiveView)
    with view:
        view.show(progress)
        progress.add(step_row(3, 1.0, reward__mean=0.512, staleness__max=2))
        progress.add(eval_row(3, 1.0, 0.7))
        view.say("half-way [bold]")
        view.show(progress)
    for part in ("3 of 100", "0.512", "0.700 of 0.9", "half-way [bold]", "actors alive"):
        assert part in output.getvalue()


def test_a_pipe_gets_the_plain_view():
    assert isinstance(open_view(Console(file=io.StringIO())), PlainView)
