"""The end of a run: every evaluation that is open is waited for, and what stays unanswered is told."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from lambdapo_async.config import RunConfig
from lambdapo_async.metrics import EVAL, EVENT
from lambdapo_async.rollout import Lease
from tests.fakes_broker import FakeRun
from tests.learner_stage import Actor, acting, rows_of, stage_config, staged
from tests.tiny_models import tiny_model_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model_folder(tmp_path / "model")
    return tmp_path


def test_the_last_evaluation_is_waited_for(folder: Path) -> None:
    run = FakeRun("run")
    settings = stage_config(evaluation={"every_steps": 4}, learner={"num_steps": 6})
    with staged(run, folder, settings) as stage, acting(run, settings):
        stage.learner.run()
    assert [row.step for row in rows_of(folder, EVAL)] == [0, 4, 6]


def test_a_last_evaluation_that_nobody_answers_keeps_nothing_from_its_end(folder: Path) -> None:
    run = FakeRun("run")
    settings = stage_config(
        evaluation={"every_steps": 1}, learner={"num_steps": 1, "data_timeout_s": 3.0}, staleness={"max_staleness": 0}
    )
    with staged(run, folder, settings) as stage, acting(run, settings) as actor:
        stepping = threading.Thread(target=stage.learner.run)
        stage.parts.stepper.train = _then(stage.parts.stepper.train, actor._stopping.set)
        stepping.start()
        stepping.join(30)
    assert not stepping.is_alive()
    (text,) = left_out(folder)
    assert text.startswith("evaluations left out because no answer came for learner.data_timeout_s = 3 s: ")
    assert text.endswith("step 1 has 0 of 2 answers")
    assert [row.step for row in rows_of(folder, EVENT) if row.text == "checkpoint"] == [0, 1]
    assert (folder / "final" / "config.json").exists()
    assert run.run_store.state().phase == "finished"


class Clock:
    """Stands in for ``time`` where the learner waits: it moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def move(self, seconds: float) -> None:
        self.now += seconds


def test_a_last_evaluation_whose_answers_still_come_is_not_cut_off(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each answer comes within ``data_timeout_s`` of the one before it, all of them in more than that."""
    run, clock = FakeRun("run"), Clock()
    monkeypatch.setattr("learner.learner.time", clock)
    settings = stage_config(
        evaluation={"every_steps": 4, "num_prompts": 5}, learner={"num_steps": 1, "data_timeout_s": 20.0}
    )
    with staged(run, folder, settings) as stage, acting(run, settings):
        stage.parts.batcher.evaluate = _then(stage.parts.batcher.evaluate, lambda: clock.move(15.0))
        stage.learner.run()
    assert {row.step: row.values["eval/num"] for row in rows_of(folder, EVAL)} == {0: 5, 1: 5}
    assert clock.now == 150.0


class Reluctant(Actor):
    """Holds held-out prompts back until it has ``num_held``, answers the newest first, and one of step 0 never."""

    def __init__(self, run: FakeRun, settings: RunConfig, *, num_held: int, leaves_out: Lease | None = None) -> None:
        super().__init__(run, settings)
        self._num_held, self._leaves_out = num_held, leaves_out
        self._held: list[Lease] = []

    def _choose(self, leases: Sequence[Lease]) -> Sequence[Lease]:
        chosen = [lease for lease in leases if lease.split == "train"]
        self._held += [lease for lease in leases if lease.split == "heldout"]
        if len(self._held) < self._num_held:
            return chosen
        ready, self._held = sorted(self._held, key=lambda lease: -lease.round), []
        self._num_held = 0
        return [*chosen, *(lease for lease in ready if lease != self._leaves_out)]


@contextmanager
def played(actor: Actor) -> Iterator[None]:
    actor.start()
    try:
        yield
    finally:
        actor.stop()


def left_out(folder: Path) -> list[str]:
    return [row.text for row in rows_of(folder, EVENT) if "left out" in row.text]


THREE_ROUNDS = stage_config(evaluation={"every_steps": 2}, learner={"num_steps": 4})


def test_every_evaluation_that_is_open_at_the_end_is_waited_for(folder: Path) -> None:
    run = FakeRun("run")
    with staged(run, folder, THREE_ROUNDS) as stage, played(Reluctant(run, THREE_ROUNDS, num_held=6)):
        stage.learner.run()
    assert [row.step for row in rows_of(folder, EVAL)] == [4, 2, 0]
    assert left_out(folder) == []


def test_what_stays_unanswered_is_told_with_its_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, clock = FakeRun("run"), Clock()
    monkeypatch.setattr("learner.learner.time", clock)
    actor = Reluctant(run, THREE_ROUNDS, num_held=6, leaves_out=Lease("heldout", 1, 0))
    with staged(run, folder, THREE_ROUNDS) as stage, played(actor):
        batcher, evaluation = stage.parts.batcher, stage.parts.resync.evaluation
        batcher.serve_evaluation = _then(
            batcher.serve_evaluation, lambda: clock.move(30.0 if evaluation.num_missing == 1 else 0.0)
        )
        stage.learner.run()
    assert [row.step for row in rows_of(folder, EVAL)] == [4, 2]
    reason = "no answer came for learner.data_timeout_s = 20 s"
    assert left_out(folder) == [f"evaluations left out because {reason}: step 0 has 1 of 2 answers"]
    assert run.run_store.state().phase == "finished"


def test_what_a_reached_target_leaves_unanswered_is_told_and_not_waited_for(folder: Path) -> None:
    run = FakeRun("run")
    settings = stage_config(evaluation={"every_steps": 1, "target": 0.5}, learner={"num_steps": 100})
    actor = Reluctant(run, settings, num_held=0, leaves_out=Lease("heldout", 1, 0))
    with staged(run, folder, settings) as stage, played(actor):
        stage.parts.batcher.serve_evaluation = lambda: pytest.fail("nothing hangs on an answer")
        stage.learner.run()
    (text,) = left_out(folder)
    assert text.startswith("evaluations left out because the target was reached: step 0 has 1 of 2 answers")


def _then(first: Callable, second: Callable) -> Callable:
    def both(*args, **kwargs):
        outcome = first(*args, **kwargs)
        second()
        return outcome

    return both
