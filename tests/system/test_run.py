"""Whole runs: real Redis, real vLLM actors, a real learner, and kill -9."""

import math
import os
import signal
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.metrics import EVAL, EVENT, STEP, MetricRow, read_metrics
from tests.nursery import Nursery
from tests.processes import ROOT, Process, wait_until

pytestmark = [pytest.mark.system, pytest.mark.engine, pytest.mark.timeout(1000)]

DEMO = ROOT / "configs" / "arithmetic_demo.toml"
SMOKE = ROOT / "configs" / "gsm8k_cpu_smoke.toml"
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"
START_S, RUN_S = 600.0, 300.0
RISE = ("learner.num_steps=25", "evaluation.every_steps=25", "actor.dtype=bfloat16")


@dataclass(frozen=True)
class Scene:
    """Where a run plays."""

    run_id: str
    redis_url: str
    output_dir: Path
    nursery: Nursery
    logs: Path

    @property
    def folder(self) -> Path:
        return self.output_dir / self.run_id

    def learner_arguments(self, *overrides: str) -> list[str]:
        settings = [f"output_dir={self.output_dir}", *overrides]
        flags = [part for setting in settings for part in ("--set", setting)]
        return ["--run-id", self.run_id, "--redis-url", self.redis_url, *flags]

    def start_actor(self, name: str) -> int:
        arguments = ["--redis-url", self.redis_url, "--run-id", self.run_id]
        return self.nursery.start_actor(arguments, self.logs / f"{name}.log")

    def wait_open(self, process: Process) -> None:
        """An actor can join once the learner has published the run."""
        run = RedisRun(self.redis_url, self.run_id, timeout_s=10.0)
        wait_until(lambda: is_open(run), "the run opens", timeout_s=START_S, alive=process)
        run.close()

    def wait_step(self, step: int, process: Process) -> None:
        wait_until(lambda: last_step(self.folder) >= step, f"step {step}", timeout_s=RUN_S, alive=process)


def is_open(run: RedisRun) -> bool:
    from lambdapo_async.errors import RunNotFoundError

    try:
        return run.run_store.state().phase == "running"
    except RunNotFoundError:
        return False


@contextmanager
def learner(config: Path, *arguments: str, log: Path) -> Iterator[Process]:
    process = Process("learner", str(config), *arguments, log=log)
    try:
        yield process
    finally:
        process.kill()


def rows(folder: Path, kind: str) -> list[MetricRow]:
    """Rows of one kind in a run's metrics.jsonl; none before the file exists."""
    path = folder / "metrics.jsonl"
    return [row for row in read_metrics(path) if row.kind == kind] if path.exists() else []


def last_step(folder: Path) -> int:
    return max((row.step for row in rows(folder, STEP)), default=0)


@pytest.fixture
def scene(request: pytest.FixtureRequest, redis_url: str, output_dir: Path, nursery: Nursery, tmp_path: Path) -> Scene:
    return Scene(request.node.name[:50].replace("[", "-").replace("]", ""), redis_url, output_dir, nursery, tmp_path)


def descendants(pid: int) -> Sequence[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def test_reward_rises_and_a_killed_actor_is_replaced(scene: Scene) -> None:
    """20 and more steps: reward rises, engine and learner agree, kill -9 of an actor stops nothing."""
    arguments = scene.learner_arguments(*RISE)
    with learner(DEMO, *arguments, log=scene.logs / "learner.log") as process:
        scene.wait_open(process)
        victim, survivor = scene.start_actor("victim"), scene.start_actor("survivor")
        scene.wait_step(6, process)
        engine_processes = descendants(victim)
        os.kill(victim, signal.SIGKILL)
        assert scene.nursery.wait_exit(victim) == -signal.SIGKILL
        _, alive = psutil.wait_procs(engine_processes, timeout=30)
        assert not alive, f"kill -9 left {alive}"
        assert process.wait(timeout_s=RUN_S) == 0
    assert scene.nursery.wait_exit(survivor) == 0

    steps = rows(scene.folder, STEP)
    assert [row.step for row in steps] == list(range(1, 26))
    rewards = [row.values["reward/verifiable"] for row in steps]
    assert statistics.fmean(rewards[-5:]) > statistics.fmean(rewards[:5]) + 0.1
    held_out = {row.step: row.values["eval/reward"] for row in rows(scene.folder, EVAL)}
    assert held_out[25] > held_out[0] + 0.1
    assert max(row.values["staleness/max"] for row in steps) <= 16
    mismatch = [row.values["mismatch/fresh"] for row in steps if "mismatch/fresh" in row.values]
    assert mismatch
    assert statistics.fmean(mismatch) < 0.02


def test_a_killed_learner_resumes_and_its_history_continues(scene: Scene) -> None:
    overrides = ("learner.num_steps=12", "learner.checkpoint_every=4", "evaluation.every_steps=0")
    arguments = scene.learner_arguments(*overrides)
    with learner(DEMO, *arguments, log=scene.logs / "first.log") as process:
        scene.wait_open(process)
        actor = scene.start_actor("actor")
        scene.wait_step(6, process)
        before = {row.step: row for row in rows(scene.folder, STEP)}
        process.kill()
    with learner(DEMO, *arguments, "--resume", log=scene.logs / "second.log") as process:
        assert process.wait(timeout_s=RUN_S) == 0, process.log_tail()
    assert scene.nursery.wait_exit(actor) == 0

    steps = rows(scene.folder, STEP)
    assert [row.step for row in steps] == list(range(1, 13))
    resumed_at = max(
        row.step
        for row in rows(scene.folder, EVENT)
        if row.text == "checkpoint" and row.step < 12 and row.step % 4 == 0
    )
    assert resumed_at >= 4
    kept = [row for row in steps if row.step <= 4]
    assert all(row.values["loss/policy"] == before[row.step].values["loss/policy"] for row in kept)
    versions = [row.values["policy_version"] for row in steps]
    assert versions == sorted(set(versions)), "a version number was used twice"
    trained = [row.values["groups/trained"] for row in steps]
    assert all(math.isfinite(row.values["loss/policy"]) for row in steps)
    assert trained[3] == before[4].values["groups/trained"]


def test_adapters_alone_travel_and_engine_and_learner_agree(scene: Scene) -> None:
    lora = ("learner.lora.rank=2", "actor.stale_kv=false")
    overrides = (*lora, "learner.lr=1e-3", "learner.num_steps=5", "evaluation.every_steps=0")
    with learner(DEMO, *scene.learner_arguments(*overrides), log=scene.logs / "learner.log") as process:
        scene.wait_open(process)
        actor = scene.start_actor("actor")
        assert process.wait(timeout_s=RUN_S) == 0, process.log_tail()
    assert scene.nursery.wait_exit(actor) == 0
    steps = rows(scene.folder, STEP)
    assert [row.step for row in steps] == [1, 2, 3, 4, 5]
    first, *later = (row.values["weights/bytes"] for row in steps if "weights/bytes" in row.values)
    assert 0 < max(later) < 0.1 * first
    mismatch = [row.values["mismatch/fresh"] for row in steps if "mismatch/fresh" in row.values]
    assert mismatch
    assert statistics.fmean(mismatch) < 0.02


def test_real_gsm8k_rows_go_through_the_whole_pipeline(scene: Scene) -> None:
    if not GSM8K.is_dir():
        pytest.skip("GSM8K is not beside this checkout (../shared/data/gsm8k)")
    data = (f"task.train_path={GSM8K / 'train.jsonl'}", f"task.heldout_path={GSM8K / 'test.jsonl'}")
    with learner(SMOKE, *scene.learner_arguments(*data), log=scene.logs / "learner.log") as process:
        scene.wait_open(process)
        actor = scene.start_actor("actor")
        assert process.wait(timeout_s=RUN_S) == 0, process.log_tail()
    assert scene.nursery.wait_exit(actor) == 0
    steps = rows(scene.folder, STEP)
    assert [row.step for row in steps] == [1, 2, 3]
    assert all(row.values["groups/trained"] == 4 * row.step for row in steps)
    assert [row.step for row in rows(scene.folder, EVAL)] == [0, 3]


def test_sigterm_suspends_the_learner_and_drains_the_actor(scene: Scene) -> None:
    arguments = scene.learner_arguments("learner.num_steps=500", "evaluation.every_steps=0", "evaluation.target=2.0")
    with learner(DEMO, *arguments, log=scene.logs / "learner.log") as process:
        scene.wait_open(process)
        actor = scene.start_actor("actor")
        scene.wait_step(2, process)
        process.send(signal.SIGTERM)
        assert process.wait(timeout_s=60.0) == 0, process.log_tail()
    run = RedisRun(scene.redis_url, scene.run_id, timeout_s=10.0)
    assert run.run_store.state().phase == "running"
    os.kill(actor, signal.SIGTERM)
    assert scene.nursery.wait_exit(actor) == 0
    assert run.fleet.members() == ()
    assert [row.text for row in rows(scene.folder, EVENT)][-2:] == ["checkpoint", "suspended"]
    run.close()
