"""A learner that lost the run and does not know it yet leaves a checkpoint; the run goes on as if it had not."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lambdapo_async.broker.interface import Descriptor
from lambdapo_async.config import RunConfig
from lambdapo_async.journal.records import GroupRecord
from lambdapo_async.rollout import Lease
from lambdapo_async.wire import encode_group
from learner.replay import Recording, replay
from tests.fakes_broker import FakeRun
from tests.fakes_nfs import cached_listing
from tests.learner_stage import Stage, acting, journal_of, stage_config, staged, trained_in
from tests.random_groups import random_group
from tests.resumed_run import assert_same_bits
from tests.tiny_models import tiny_model_folder

LAST_INDEX = 11
"""Of the run's 6 steps of 2 groups."""


class Stopped(Exception):  # noqa: N818
    """A learner's loop ends here: frozen, or dead."""


def stop_in_step(stage: Stage, step: int) -> None:
    """It goes on until the step is journaled, and does not train it."""
    train = stage.parts.stepper.train

    def train_or_stop(batch):
        if stage.parts.stepper.step + 1 == step:
            raise Stopped
        return train(batch)

    stage.parts.stepper.train = train_or_stop
    with pytest.raises(Stopped):
        stage.learner.run()
    stage.parts.resync.ingest.close()


@contextmanager
def frozen_in_step(run: FakeRun, folder: Path, settings: RunConfig, step: int) -> Iterator[Stage]:
    with staged(run, folder, settings) as stage:
        stop_in_step(stage, step)
        yield stage


def late_group(settings: RunConfig) -> GroupRecord:
    """Had been read, not journaled, when its learner froze; nobody after it has got so far."""
    payload = encode_group(random_group(LAST_INDEX, settings, vocab=61, version=2))
    return GroupRecord(Descriptor("late", 1, Lease("train", LAST_INDEX), 2, len(payload), 0.5), payload)


def test_the_checkpoint_of_a_learner_that_woke_up_costs_no_group(folder: Path) -> None:
    run, settings = FakeRun("run"), stage_config(learner={"checkpoint_every": 100})
    checkpoints = folder / "checkpoints"
    with acting(run, settings):
        with frozen_in_step(run, folder, settings, 3) as old:
            listing = list(checkpoints.iterdir())
            with staged(run, folder, settings) as successor:
                stop_in_step(successor, 4)
                successor.kill()
            old.parts.resync.book.enter([late_group(settings)])
            with cached_listing(checkpoints, listing, is_dropped_by_changes=False):
                old.learner._checkpoint()
        assert list(checkpoints.glob("step-00000002.fence-1.*")), "the fake let the old one save"
        with staged(run, folder, settings) as third:
            assert third.parts.stepper.step == 0
            third.learner.run()
    assert Counter(trained_in(folder)) == Counter(f"train:0:{i}" for i in range(LAST_INDEX + 1))
    assert "late" not in {r.descriptor.producer for _, r in journal_of(folder) if isinstance(r, GroupRecord)}
    uninterrupted = folder / "uninterrupted"
    replay(Recording.open(folder, [f"model.path={folder / 'model'}"]), uninterrupted)
    assert_same_bits(folder, uninterrupted, num_steps=6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model_folder(tmp_path / "model")
    return tmp_path
