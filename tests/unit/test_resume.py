"""A learner killed anywhere ends with the bits of one that lived: an uninterrupted replay of the same journal."""

import contextlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from lambdapo_async.cli.errors import USER_ERROR_STATUS, run_main
from lambdapo_async.errors import CheckpointError, ConfigError
from lambdapo_async.journal.records import JournalError, VersionRecord
from lambdapo_async.weights.hf_folder import replace_hf_folder
from learner.replay import Recording, app, replay
from tests.fakes_broker import FakeRun
from tests.full_disk import full_disk
from tests.learner_stage import Stage, acting, journal_of, stage_config, staged, trained_in
from tests.resumed_run import assert_same_bits, fingerprint, losses, newest
from tests.tiny_models import tiny_model_folder

REUSE = {"max_uses": 3, "samples_per_insert": 1.5, "error_buffer": 3.0, "min_size": 3, "half_life": 2.0}


class Crash(Exception):  # noqa: N818
    """Stands in for kill -9: nothing after it reaches the disk."""


def die_in(stage: Stage, place: object, name: str, *, call: int, before: bool) -> None:
    """The learner dies at the ``call``-th call of a method, before or after it does its work."""
    method, calls = getattr(place, name), Counter[str]()

    def dying(*args: object, **kwargs: object) -> object:
        calls["all"] += 1
        is_due = calls["all"] == call
        outcome = None if is_due and before else method(*args, **kwargs)
        if is_due:
            stage.kill()
            raise Crash
        return outcome

    setattr(place, name, dying)


POINTS: dict[str, Callable[[Stage, int], None]] = {
    "journaled, not committed": lambda stage, n: die_in(stage, stage.source, "commit", call=n, before=True),
    "step written, not trained": lambda stage, n: die_in(stage, stage.parts.stepper, "train", call=n, before=True),
    "trained, no version claimed": lambda stage, n: die_in(stage, stage.parts.stepper, "train", call=n, before=False),
    "version claimed, not published": lambda stage, n: die_in(
        stage, stage.parts.resync.versions, "claim", call=n + 1, before=False
    ),
    "published, not in a checkpoint": lambda stage, n: die_in(stage, stage.source, "stats", call=n, before=True),
    "checkpoint half written": lambda stage, _: die_in(stage, stage.policy, "save_model", call=2, before=False),
    "checkpoint written, journal not pruned": lambda stage, _: die_in(
        stage, stage.parts.resync.checkpoints, "prune", call=2, before=True
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model_folder(tmp_path / "model")
    return tmp_path


def live(run: FakeRun, folder: Path, settings, die: Callable[[Stage], None] | None = None) -> bool:
    """One life; whether it came to its end."""
    with staged(run, folder, settings) as stage:
        if die is None:
            stage.learner.run()
            return True
        die(stage)
        with pytest.raises((Crash, JournalError)):
            stage.learner.run()
        return False


def assert_as_if_it_had_lived(folder: Path, num_steps: int) -> None:
    uninterrupted = folder / "uninterrupted"
    replay(Recording.open(folder, [f"model.path={folder / 'model'}"]), uninterrupted)
    assert_same_bits(folder, uninterrupted, num_steps=num_steps)


@pytest.mark.parametrize("call", [1, 3])
@pytest.mark.parametrize("point", POINTS)
def test_a_killed_learner_ends_as_if_it_had_lived(folder: Path, point: str, call: int) -> None:
    run, settings = FakeRun("run"), stage_config()
    with acting(run, settings):
        live(run, folder, settings, lambda stage: POINTS[point](stage, call))
        live(run, folder, settings)
    assert Counter(trained_in(folder)) == Counter(f"train:0:{i}" for i in range(12))
    versions = [record.version for _, record in journal_of(folder) if isinstance(record, VersionRecord)]
    assert versions == sorted(set(versions)), "a version number was used twice"
    assert_as_if_it_had_lived(folder, 6)


def test_so_does_one_that_dies_again_while_it_takes_steps_again(folder: Path) -> None:
    run, settings = FakeRun("run"), stage_config(learner={"checkpoint_every": 4})
    with acting(run, settings):
        live(run, folder, settings, lambda stage: POINTS["published, not in a checkpoint"](stage, 3))
        for call in (1, 2, 3):
            live(run, folder, settings, lambda stage, n=call: POINTS["step written, not trained"](stage, n))
        live(run, folder, settings)
    assert_as_if_it_had_lived(folder, 6)


def test_actors_hear_of_a_learner_that_takes_steps_again(folder: Path) -> None:
    run, settings = FakeRun("run"), stage_config(learner={"checkpoint_every": 4})
    silent_s: list[float] = []
    with acting(run, settings):
        live(run, folder, settings, lambda stage: POINTS["published, not in a checkpoint"](stage, 3))
        with staged(run, folder, settings) as stage:
            train = stage.parts.stepper.train

            def train_long(batch):
                silent_s.append(run.shared.learner_silent_s)
                run.shared.learner_silent_s = 999.0
                return train(batch)

            stage.parts.stepper.train = train_long
            stage.learner.run()
    assert silent_s[:3] == [0.0] * 3, "steps 1 to 3 were in the journal"


@pytest.mark.parametrize("point", ["step written, not trained", "checkpoint half written"])
def test_so_does_one_that_trains_on_groups_again(folder: Path, point: str) -> None:
    run, settings = FakeRun("run"), stage_config(replay=REUSE, learner={"num_steps": 8, "checkpoint_every": 3})
    with acting(run, settings):
        live(run, folder, settings, lambda stage: POINTS[point](stage, 5))
        live(run, folder, settings)
    uses = Counter(trained_in(folder))
    assert max(uses.values()) > 1
    assert_as_if_it_had_lived(folder, 8)


def test_a_suspended_run_goes_on_as_if_it_had_not_been(folder: Path) -> None:
    run, settings = FakeRun("run"), stage_config(learner={"checkpoint_every": 100})
    with acting(run, settings):
        with staged(run, folder, settings) as stage:
            train = stage.parts.stepper.train

            def train_and_stop(batch):
                trained = train(batch)
                if stage.parts.stepper.step == 3:
                    stage.learner.stop()
                return trained

            stage.parts.stepper.train = train_and_stop
            stage.learner.run()
        assert newest(folder).state.step == 3
        live(run, folder, settings)
    assert_as_if_it_had_lived(folder, 6)


@pytest.mark.parametrize(
    ("find", "name", "error"),
    [
        (lambda stage: stage.parts.resync.checkpoints, "save", CheckpointError),
        (lambda stage: stage.parts.journal, "append", JournalError),
    ],
)
def test_a_learner_whose_disk_was_full_goes_on_once_there_is_room(
    folder: Path, find: Callable[[Stage], object], name: str, error: type[Exception]
) -> None:
    run, settings = FakeRun("run"), stage_config()
    with acting(run, settings):
        with staged(run, folder, settings) as stage:
            place = find(stage)
            write = getattr(place, name)

            def write_without_room(*args: object) -> object:
                with full_disk() if stage.parts.stepper.step == 4 else contextlib.nullcontext():
                    return write(*args)

            setattr(place, name, write_without_room)
            with pytest.raises(error, match=r"cannot be written: .*; free disk space"):
                stage.learner.run()
        live(run, folder, settings)
    assert_as_if_it_had_lived(folder, 6)


def test_a_run_whose_disk_was_full_at_its_end_gets_its_final_model_once_there_is_room(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace_without_room(*args: object) -> None:
        with full_disk():
            replace_hf_folder(*args)

    run, settings = FakeRun("run"), stage_config(learner={"num_steps": 1})
    with acting(run, settings):
        with monkeypatch.context() as patched, staged(run, folder, settings) as stage:
            patched.setattr("learner.learner.replace_hf_folder", replace_without_room)
            with pytest.raises(CheckpointError, match=r"final cannot be written: .*; free disk space"):
                stage.learner.run()
        assert list(folder.glob("*final*")) == []
        live(run, folder, settings)
    assert (folder / "final" / "config.json").exists()


def test_versions_go_on_where_only_the_checkpoint_knows_of_the_last(folder: Path) -> None:
    """The learner took groups after its last version, was suspended, and then Redis came back empty."""
    settings = stage_config(learner={"checkpoint_every": 100}, staleness={"max_staleness": 0})
    before, after = FakeRun("run"), FakeRun("run")
    with acting(before, settings), staged(before, folder, settings) as stage:
        offer = stage.parts.batcher.pool.offer

        def offer_and_stop(arrival):
            was_taken = offer(arrival)
            if stage.parts.stepper.step == 3:
                stage.learner.stop()
            return was_taken

        stage.parts.batcher.pool.offer = offer_and_stop
        stage.learner.run()
    claims = {number: record.version for number, record in journal_of(folder) if isinstance(record, VersionRecord)}
    assert max(claims) < newest(folder).state.pool.keep_from, "what is read of the journal names no version"
    with acting(after, settings):
        live(after, folder, settings)
    versions = [record.version for _, record in journal_of(folder) if isinstance(record, VersionRecord)]
    assert versions == list(range(len(versions)))
    assert_as_if_it_had_lived(folder, 6)


def test_another_loss_trains_on_the_same_groups(folder: Path) -> None:
    run, settings = FakeRun("run"), stage_config()
    with acting(run, settings):
        live(run, folder, settings)
    model = f"model.path={folder / 'model'}"
    other = folder / "other"
    replay(Recording.open(folder, [model, "objective.policy_loss.preset=ppo", "learner.lr=1e-4"]), other)
    assert [step for step, _, _ in losses(other)] == [1, 2, 3, 4, 5, 6]
    assert fingerprint(other) != fingerprint(folder)
    assert (other / "final" / "config.json").exists()
    with pytest.raises(ConfigError, match="is not empty"):
        replay(Recording.open(folder, [model]), other)
    with pytest.raises(ConfigError, match="rollout cannot be changed"):
        Recording.open(folder, [model, "rollout.groups_per_step=3"])


def test_the_command_says_what_it_would_do(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, settings = FakeRun("run"), stage_config(learner={"num_steps": 2})
    with acting(run, settings):
        live(run, folder, settings)
    with pytest.raises(SystemExit) as ended:
        run_main(app, [str(folder), "--dry-run", "--set", "objective.policy_loss.preset=ppo"])
    assert ended.value.code == 0
    assert f"would train 2 steps of {folder} again, into {folder}-replay" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        run_main(app, [str(folder), "--output", str(folder)])
    assert ended.value.code == USER_ERROR_STATUS
    assert "is not empty: name another folder with --output" in capsys.readouterr().err


def test_only_a_whole_recording_can_be_replayed(folder: Path) -> None:
    with pytest.raises(ConfigError, match="holds no journal"):
        Recording.open(folder)
    run, settings = FakeRun("run"), stage_config(learner={"record": False})
    with acting(run, settings), staged(run, folder, settings) as stage:
        stage.parts.journal._segment_bytes = 1
        stage.learner.run()
    with pytest.raises(ConfigError, match=r"learner\.record = true"):
        Recording.open(folder)
