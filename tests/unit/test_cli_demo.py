"""The demo's supervision, on small processes that speak as the learner and the nursery do."""

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from lambdapo_async.broker.heartbeat import Heartbeat
from lambdapo_async.cli.actor_pool import ActorPool, NurseryError, NurseryPool, ProcessPool, kill_one, require_healthy
from lambdapo_async.cli.demo_run import DemoParts, DemoRun
from lambdapo_async.cli.progress import Progress
from lambdapo_async.cli.progress_view import PlainView
from lambdapo_async.cli.supervise import ChildFailedError, Supervisor, last_lines
from lambdapo_async.metrics import EVENT, read_metrics
from lambdapo_async.report.summary import KILLED, summarise
from tests.processes import is_gone, wait_until

ACTOR = "import signal; signal.pause()"
LEARNER = """
import json, pathlib, sys, time
path = pathlib.Path(sys.argv[1])
def write(kind, step, **values):
    with path.open("a") as file:
        file.write(json.dumps({"step": step, "time": time.time(), "kind": kind, **values}) + "\\n")
def wait_for(text):
    deadline = time.monotonic() + 30
    while text not in path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
write("eval", 0, **{"eval/reward": 0.4})
write("step", 1, **{"reward/mean": 0.5, "time/step_s": 0.1})
write("eval", 1, **{"eval/reward": 0.7})
wait_for("killed")
write("step", 2, **{"reward/mean": 0.8, "time/step_s": 0.1})
write("eval", 2, **{"eval/reward": 0.95})
"""
NURSERY = """
import json, subprocess, sys
print(json.dumps({"event": "ready"}), flush=True)
actors = {}
for line in sys.stdin:
    order = json.loads(line)
    log = open(order["log"], "w")
    actor = subprocess.Popen([sys.executable, "-c", sys.argv[1], *order["args"]], stdout=log, stderr=log)
    actors[actor.pid] = actor
    print(json.dumps({"event": "started", "pid": actor.pid}), flush=True)
    if len(actors) > 2:
        first = next(iter(actors.values()))
        print(json.dumps({"event": "exited", "pid": first.pid, "returncode": first.wait()}), flush=True)
for actor in actors.values():
    actor.terminate()
    actor.wait()
"""


class Watch:
    """A run that is published from the second look on."""

    def __init__(self) -> None:
        self._looks = 0

    def is_published(self) -> bool:
        self._looks += 1
        return self._looks > 1

    def fleet(self) -> Sequence[Heartbeat]:
        return ()


class Scene:
    """Everything of a demo but the real processes."""

    def __init__(self, folder: Path, supervisor: Supervisor) -> None:
        self.folder, self.supervisor, self.output = folder, supervisor, io.StringIO()
        self.metrics = folder / "metrics.jsonl"
        self.progress = Progress(num_steps=10, target=0.9)

    def nursery(self, actor: str = ACTOR) -> NurseryPool:
        command = [sys.executable, "-c", NURSERY, actor]
        return NurseryPool(self.supervisor, ["--run-id", "r1"], logs=self.folder, command=command)

    def processes(self, actor: str = ACTOR) -> ProcessPool:
        return ProcessPool(self.supervisor, ["--run-id", "r1"], logs=self.folder, command=[sys.executable, "-c", actor])

    def run(self, pool: ActorPool, learner: str = LEARNER) -> None:
        command = [sys.executable, "-c", learner, str(self.metrics)]
        parts = DemoParts(
            metrics=self.metrics,
            num_actors=2,
            learner=self.supervisor.start("the learner", command, log=self.folder / "learner.log"),
            pool=pool,
            watch=Watch(),
            view=PlainView(Console(file=self.output, width=200)),
            finish_s=0.1,
        )
        DemoRun(parts, self.progress).run()


@pytest.fixture
def scene(tmp_path):
    with Supervisor(os.environ, grace_s=5.0) as supervisor:
        yield Scene(tmp_path, supervisor)


@pytest.mark.parametrize("kind", ["nursery", "processes"])
def test_half_way_an_actor_is_killed_and_replaced_and_the_run_goes_on(scene, kind):
    pool: ActorPool = scene.nursery() if kind == "nursery" else scene.processes()
    scene.run(pool)
    assert scene.progress.is_target_reached
    assert scene.progress.step == 2
    (event,) = [row for row in read_metrics(scene.metrics) if row.kind == EVENT]
    assert event.text.startswith(f"{KILLED} actor-0 (pid ")
    assert event.text.endswith("actor-2 takes its place")
    assert "half-way at held-out reward 0.700" in scene.output.getvalue()
    assert summarise(read_metrics(scene.metrics), target=0.9).actors_killed == 1


def test_no_process_is_left_when_the_demo_is_over(tmp_path):
    with Supervisor(os.environ) as supervisor:
        scene = Scene(tmp_path, supervisor)
        pool = scene.processes()
        scene.run(pool)
        actors = pool.poll()
    assert len(actors) == 3
    assert all(actor.pid is not None and is_gone(actor.pid) for actor in actors)


@pytest.mark.parametrize("status", [0, 1])
def test_a_learner_that_ends_before_there_is_a_run_shows_its_log(scene, status):
    with pytest.raises(ChildFailedError, match=f"(?s)the learner ended with exit code {status}.*no model"):
        scene.run(scene.processes(), learner=f"import sys; print('no model'); sys.exit({status})")


def test_a_learner_that_dies_later_shows_its_log(scene):
    dying = LEARNER.replace('wait_for("killed")', "raise SystemExit('out of memory')")
    with pytest.raises(ChildFailedError, match=r"(?s)the learner ended with exit code 1.*out of memory"):
        scene.run(scene.processes(), learner=dying)


def test_an_actor_that_dies_by_itself_shows_its_log(scene):
    waiting = LEARNER.replace("killed", "never")
    with pytest.raises(ChildFailedError, match=r"(?s)actor-0 ended with exit code 1.*no engine"):
        scene.run(scene.processes("raise SystemExit('no engine')"), learner=waiting)


def test_an_actor_that_goes_home_is_no_failure(scene):
    pool = scene.processes("raise SystemExit(0)")
    pool.start()
    wait_until(lambda: pool.poll()[0].returncode == 0, "the actor's end")
    require_healthy(pool)


def test_a_nursery_that_dies_shows_its_log(scene):
    pool = NurseryPool(
        scene.supervisor, [], logs=scene.folder, command=[sys.executable, "-c", "raise SystemExit('no vllm')"]
    )
    with pytest.raises(ChildFailedError, match=r"(?s)the nursery ended with exit code 1.*no vllm"):
        scene.run(pool, learner=LEARNER.replace("killed", "never"))


def test_a_refused_order_is_an_error(scene):
    code = """
import sys
sys.stdin.readline()
print('{"event": "refused", "reason": "no room"}', flush=True)
sys.stdin.read()
"""
    pool = NurseryPool(scene.supervisor, [], logs=scene.folder, command=[sys.executable, "-c", code])
    with pytest.raises(NurseryError, match="refused to start actor-0: no room"):
        scene.run(pool, learner=LEARNER.replace("killed", "never"))


def test_only_a_running_actor_is_killed(scene):
    pool = scene.processes()
    assert kill_one(pool) is None
    first, second = pool.start(), pool.start()
    assert kill_one(pool) is first
    wait_until(lambda: pool.poll()[0].returncode is not None, "the first actor's end")
    assert kill_one(pool) is second
    assert (first.killed, second.killed) == (True, True)


def test_an_order_tells_the_nursery_arguments_and_log(scene):
    pool = scene.nursery("import sys; print(sys.argv[1:], flush=True); " + ACTOR)
    actor = pool.start()
    wait_until(lambda: last_lines(actor.log, 1) == ["['--run-id', 'r1']"], "the actor's line in its log")
    wait_until(lambda: pool.poll()[0].pid is not None, "the nursery's answer")
