"""kill -9 of real vLLM actors, a real learner with a real model, and their Redis; the journal says what came of it."""

import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lambdapo_async.journal.history import History
from lambdapo_async.journal.records import GroupRecord, StepRecord, VersionRecord
from tests.chaos.ledger import Entry, Group, Step
from tests.chaos.proof import Bounds, Violation, check
from tests.chaos.redis_control import RedisControl
from tests.chaos.remains import look_around
from tests.nursery import Nursery
from tests.system.test_run import DEMO, RUN_S, Scene, learner

pytestmark = [pytest.mark.system, pytest.mark.engine, pytest.mark.timeout(1000)]

BOUNDS = Bounds(groups_per_step=16, drop_above=16)


@pytest.fixture
def server() -> Iterator[RedisControl]:
    with tempfile.TemporaryDirectory(prefix="lp-") as folder:
        control = RedisControl(Path(folder), "everysec")
        control.start()
        with contextlib.closing(control):
            yield control


def violations_in(run: Path, spool: Path, server: RedisControl) -> list[Violation]:
    """What a recorded journal proves."""
    entries: list[Entry] = []
    history: list[Step] = []
    groups: dict[int, Group] = {}
    for number, record in History.find(run / "journal").read(1):
        if isinstance(record, GroupRecord) and record.descriptor.lease.split == "train":
            of = record.descriptor
            groups[number] = Group(of.producer, of.seq, of.lease.index, of.min_version)
            fields = {"producer": of.producer, "seq": of.seq, "index": of.lease.index}
            entries.append(Entry(number, "learner", "received", fields))
            if record.discarded:
                entries.append(Entry(number, "learner", "discarded", {**fields, "reason": record.discarded}))
        elif isinstance(record, StepRecord):
            history.append(Step(record.version, tuple(groups[chosen] for chosen in record.chosen)))
    return check(entries, replace(look_around(run, spool, server), history=history), BOUNDS)


def test_nothing_is_lost_and_nothing_trained_twice(
    server: RedisControl, nursery: Nursery, output_dir: Path, tmp_path: Path
) -> None:
    scene = Scene("engine-chaos", server.url, output_dir, nursery, tmp_path)
    settings = ("learner.num_steps=14", "learner.record=true", "learner.checkpoint_every=4", "evaluation.every_steps=0")
    broker = ("broker.lease_s=6", "broker.heartbeat_s=1", f"actor.spool_dir={tmp_path / 'spool'}")
    arguments = scene.learner_arguments(*settings, *broker)
    with learner(DEMO, *arguments, log=tmp_path / "first.log") as first:
        scene.wait_open(first)
        victim, survivor = scene.start_actor("victim"), scene.start_actor("survivor")
        scene.wait_step(3, first)
        os.kill(victim, signal.SIGKILL)
        assert nursery.wait_exit(victim) == -signal.SIGKILL
        replacement = scene.start_actor("replacement")  # adopts what the victim had not got rid of
        scene.wait_step(5, first)
        first.send(signal.SIGKILL)
        first.wait(timeout_s=30.0)
    with learner(DEMO, *arguments, "--resume", log=tmp_path / "second.log") as second:
        scene.wait_step(8, second)
        server.kill()
        server.start()
        assert second.wait(timeout_s=RUN_S) == 0, second.log_tail()
    assert [nursery.wait_exit(actor) for actor in (survivor, replacement)] == [0, 0]
    run = output_dir / scene.run_id
    assert violations_in(run, tmp_path / "spool", server) == []
    versions = [each.version for _, each in History.find(run / "journal").read(1) if isinstance(each, VersionRecord)]
    assert versions == sorted(set(versions))
