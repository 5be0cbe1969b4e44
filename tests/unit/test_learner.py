"""The learner's loop on a run in memory: what is trained, published, committed, and what a crash does to it."""

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lambdapo_async import fleet_health
from lambdapo_async.errors import FencedError, NoGroupsError
from lambdapo_async.journal.history import History
from lambdapo_async.journal.records import GroupRecord
from lambdapo_async.metrics import EVAL, EVENT, STEP
from learner.assembly import JOURNAL_FOLDER
from tests.contract.test_broker_run import heartbeat
from tests.fakes_broker import FakeRun
from tests.learner_stage import acting, is_open, journal_of, rows_of, stage_config, staged, trained_in
from tests.tiny_models import tiny_model_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model_folder(tmp_path / "model")
    return tmp_path


def events(folder: Path, text: str) -> list[int]:
    return [row.step for row in rows_of(folder, EVENT) if row.text == text]


def test_a_run_trains_publishes_commits_and_finishes(folder: Path) -> None:
    run, settings = FakeRun("run"), stage_config()
    with staged(run, folder, settings) as stage, acting(run, settings):
        stage.learner.run()
    steps = rows_of(folder, STEP)
    assert [row.step for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [row.values["policy_version"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert run.weights.head() == 6
    assert run.run_store.state().phase == "finished"
    assert Counter(trained_in(folder)) == Counter(f"train:0:{i}" for i in range(12))
    assert max(row.values["staleness/max"] for row in steps) <= 2
    assert events(folder, "checkpoint") == [0, 2, 4, 6]


def test_groups_leave_redis_as_soon_as_they_are_journaled(folder: Path) -> None:
    """Redis holds a fraction of what lies between two checkpoints, and the run goes through."""
    run = FakeRun("run")
    settings = stage_config(
        learner={"num_steps": 12, "checkpoint_every": 100, "record": False}, broker={"max_groups": 6}
    )
    with staged(run, folder, settings) as stage, acting(run, settings):
        stage.learner.run()
    assert Counter(trained_in(folder)) == Counter(f"train:0:{i}" for i in range(24))
    assert events(folder, "checkpoint") == [0, 12]


def test_the_journal_goes_with_the_checkpoints_unless_it_is_recorded(folder: Path) -> None:
    run, settings = FakeRun("run"), stage_config(learner={"record": False})
    with staged(run, folder, settings) as stage, acting(run, settings):
        stage.parts.journal._segment_bytes = 1
        stage.learner.run()
    assert History.find(folder / JOURNAL_FOLDER).first_number > 1
    with staged(run, folder, stage_config(learner={"record": False, "num_steps": 8})) as stage, acting(run, settings):
        stage.learner.run()
    assert len(rows_of(folder, STEP)) == 8


def test_the_final_model_is_one_that_transformers_reads(folder: Path) -> None:
    run, settings = FakeRun("run"), stage_config(learner={"num_steps": 1})
    with staged(run, folder, settings) as stage, acting(run, settings):
        stage.learner.run()
        published = {name: weight.clone() for name, weight in stage.policy.named_bf16()}
    model = AutoModelForCausalLM.from_pretrained(folder / "final", dtype=torch.bfloat16)
    loaded = dict(model.named_parameters())
    for name, weight in published.items():
        assert torch.equal(loaded[name].detach(), weight), name
    # A finished run that goes on leaves its newest model there.
    more = stage_config(learner={"num_steps": 2})
    with staged(run, folder, more) as stage, acting(run, more):
        stage.learner.run()
    again = AutoModelForCausalLM.from_pretrained(folder / "final", dtype=torch.bfloat16)
    assert not all(torch.equal(weight, loaded[name]) for name, weight in again.named_parameters())


def test_the_final_model_of_adapters_is_one_merged_model(folder: Path) -> None:
    pytest.importorskip("peft")
    run, settings = FakeRun("run"), stage_config(learner={"num_steps": 2, "lr": 1e-2, "lora": {"rank": 4}})
    with staged(run, folder, settings) as stage, acting(run, settings):
        before = {name: weight.clone() for name, weight in stage.policy.named_bf16()}
        stage.learner.run()
        merged = {name: weight.clone() for name, weight in stage.policy.named_bf16()}
    model = AutoModelForCausalLM.from_pretrained(folder / "final", dtype=torch.bfloat16)
    loaded = dict(model.named_parameters())
    # The adapters go out in bfloat16, so each weight lies within a rounding or two of the policy's own.
    for name, weight in merged.items():
        torch.testing.assert_close(loaded[name].detach(), weight, rtol=2**-6, atol=1e-3)
    assert not all(torch.equal(loaded[name], weight) for name, weight in before.items())


def test_the_old_learner_can_do_nothing_once_a_new_one_came(folder: Path) -> None:
    run, settings = FakeRun("run"), stage_config()
    with acting(run, settings), staged(run, folder, settings) as first, staged(run, folder, settings) as second:
        with pytest.raises(FencedError):
            first.learner.run()
        second.learner.run()
    assert Counter(trained_in(folder)) == Counter(f"train:0:{i}" for i in range(12))


def test_evaluations_are_asked_in_time_and_the_target_ends_the_run(folder: Path) -> None:
    run = FakeRun("run")
    settings = stage_config(evaluation={"every_steps": 2, "target": 0.5}, learner={"num_steps": 100})
    with staged(run, folder, settings) as stage, acting(run, settings, heldout_reward=0.5):
        stage.learner.run()
    first = rows_of(folder, EVAL)[0]
    assert (first.step, first.values["eval/reward"]) == (0, 0.5)
    assert len(rows_of(folder, STEP)) < 100
    assert run.run_store.state().phase == "finished"
    # Whoever resumes it is told that it is over.
    with staged(run, folder, settings) as stage:
        stage.learner.run()
    assert len(rows_of(folder, STEP)) < 100


def test_a_stopped_learner_leaves_a_run_that_goes_on(folder: Path) -> None:
    run, settings = FakeRun("run"), stage_config()
    with staged(run, folder, settings) as first:
        running = threading.Thread(target=first.learner.run)
        running.start()
        wait_for(lambda: bool(events(folder, "checkpoint")) and is_open(run))
        first.learner.stop()
        running.join(30)
    assert run.run_store.state().phase == "running"
    with acting(run, settings), staged(run, folder, settings) as second:
        second.learner.run()
    assert Counter(trained_in(folder)) == Counter(f"train:0:{i}" for i in range(12))


def test_no_actor_is_an_error_after_the_deadline(folder: Path) -> None:
    run = FakeRun("run")
    with (
        staged(run, folder, stage_config(learner={"data_timeout_s": 0.05})) as stage,
        pytest.raises(NoGroupsError, match="needs 2 more for a step: is an actor alive"),
    ):
        stage.learner.run()


def test_a_learner_that_waits_for_groups_can_be_stopped(folder: Path) -> None:
    run = FakeRun("run")
    with staged(run, folder, stage_config()) as stage:
        running = threading.Thread(target=stage.learner.run)
        running.start()
        stage.learner.stop()
        running.join(30)
        assert not running.is_alive()
    assert [row.text for row in rows_of(folder, EVENT)] == ["checkpoint", "suspended"]


def test_a_canary_is_of_the_weights_that_are_out(folder: Path) -> None:
    """Whenever it is asked for, the policy is the newest published version, never one update ahead of it."""
    run = FakeRun("run")
    settings = stage_config(learner={"lr": 1e-2}, evaluation={"every_steps": 4})
    with staged(run, folder, settings) as stage, acting(run, settings, is_wary=True):
        stage.learner.run()
    assert run.run_store.state().phase == "finished"
    published = stage.canary_store.published
    assert [canary.version for canary, _, _ in published[:1]] == [0]
    for canary, checksum, head in published:
        assert (canary.checksum, canary.version) == (checksum, head)
    versions = [canary.version for canary, _, _ in published]
    assert versions == sorted(versions)
    assert len({canary.checksum for canary, _, _ in published}) == len(set(versions)) >= 4


def test_an_actor_that_comes_while_the_learner_waits_gets_its_canary(folder: Path) -> None:
    run = FakeRun("run")
    with staged(run, folder, stage_config()) as stage:
        running = threading.Thread(target=stage.learner.run, daemon=True)
        running.start()
        try:
            run.canary.ask_canary()
            wait_for(lambda: is_open(run) and not run.canary.is_canary_asked())
            run.canary.ask_canary()  # nobody samples, so the learner is in the middle of waiting for a batch
            wait_for(lambda: not run.canary.is_canary_asked())
        finally:
            stage.learner.stop()
            running.join(30)
    assert {canary.version for canary, _, _ in stage.canary_store.published} == {0}


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "the learner does not serve"
        time.sleep(0.002)


def test_a_fleet_that_was_set_aside_holds_the_run_up_until_it_passes_a_canary(folder: Path) -> None:
    """A resumed learner waits for nobody in vain: it takes the actors back without a step."""
    run, settings = FakeRun("run"), stage_config()
    run.shared.set_aside = {"a"}
    with staged(run, folder, settings) as stage, acting(run, settings):
        running = threading.Thread(target=stage.learner.run)
        running.start()
        checks = itertools.count()
        wait_for(lambda: is_open(run))
        assert stage.source.stats().leased == 0
        wait_for(lambda: not run.fleet.beat(heartbeat("a", counters={"canary_checks": next(checks)})))
        running.join(60)
    assert Counter(trained_in(folder)) == Counter(f"train:0:{i}" for i in range(12))
    assert rows_of(folder, STEP)[-1].values["actors/readmitted"] == 1


def test_a_lying_actor_is_set_aside_and_the_journal_knows_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it sent meanwhile is discarded by the journal's word, so that a replay discards the same."""
    monkeypatch.setattr(fleet_health, "MIN_FRESH_TOKENS", 1)
    run, settings = FakeRun("run"), stage_config(learner={"num_steps": 12}, staleness={"max_staleness": 0})
    with (
        staged(run, folder, settings) as stage,
        acting(run, settings),
        acting(run, settings, actor_id="liar", nats_off=3.0),
    ):
        stage.learner.run()
    last = rows_of(folder, STEP)[-1].values
    assert run.shared.set_aside == {"liar"}
    assert (last["actors/quarantined"], last["actors/quarantines"]) == (1, 1)
    assert last["actors/mismatch_max"] > 5.0
    discarded = [record for _, record in journal_of(folder) if isinstance(record, GroupRecord) and record.discarded]
    assert len(discarded) == last["groups/quarantined"]


def test_actors_hear_of_a_learner_whose_step_is_long(folder: Path) -> None:
    limits = {"replay": {"max_bytes": 26_000}, "staleness": {"max_staleness": 15}, "broker": {"heartbeat_s": 0.02}}
    run, settings = FakeRun("run"), stage_config(**limits)
    told = threading.Event()
    with acting(run, settings), staged(run, folder, settings) as stage:
        commit, train = stage.source.commit, stage.parts.stepper.train

        def commit_and_tell(watermarks, **duplicates):
            commit(watermarks, **duplicates)
            if not watermarks:
                told.set()

        def train_long(batch):
            assert told.wait(20), "no sign of life while nothing could be handed over"
            return train(batch)

        stage.source.commit, stage.parts.stepper.train = commit_and_tell, train_long
        stage.learner.run()
    assert Counter(trained_in(folder)) == Counter(f"train:0:{i}" for i in range(12))
