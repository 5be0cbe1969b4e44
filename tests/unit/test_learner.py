"""The learner's loop on a run in memory: what is trained, published, committed, and what a crash does to it."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lambdapo_async.broker.interface import Descriptor, EnqueueStatus, RunLimits
from lambdapo_async.config import RunConfig
from lambdapo_async.errors import BrokerUnavailable, FencedError
from lambdapo_async.rollout import RolloutGroup
from lambdapo_async.weights.canary import Canary, ModelIdentity
from lambdapo_async.weights.state import State
from lambdapo_async.wire import encode_group
from learner.batcher import Batcher
from learner.canary import LearnerCanary, canary_sequence
from learner.checkpoint import CheckpointStore, LearnerState
from learner.evaluation import Evaluation, EvaluationResult
from learner.ingest import Ingest
from learner.learner import Learner, LearnerParts
from learner.policy import Policy
from learner.publisher import Publisher
from learner.reporting import Reporter, StepReport
from learner.trainer import Trainer
from learner.watermarks import Watermarks
from tests.contract.broker_world import durable
from tests.fakes_broker import FakeRun
from tests.groups import make_group
from tests.tiny_models import tiny_model_folder

GROUPS_PER_STEP = 2
IDENTITY = ModelIdentity.of({"config.json": b"{}"})


def config(**sections: Mapping[str, object]) -> RunConfig:
    tree: dict[str, Mapping[str, object]] = {
        "model": {"path": "unused", "max_length": 32},
        "task": {"kind": "arithmetic"},
        "sampling": {"max_tokens": 16},
        "rollout": {"group_size": 2, "groups_per_step": GROUPS_PER_STEP},
        "staleness": {"max_staleness": 1},
        "learner": {"num_steps": 6, "checkpoint_every": 2, "data_timeout_s": 20.0, "micro_batch_tokens": 64},
        "evaluation": {"every_steps": 0, "num_prompts": 2},
    }
    merged = {name: {**values, **sections.get(name, {})} for name, values in tree.items()}
    return RunConfig.model_validate({**merged, **{n: v for n, v in sections.items() if n not in merged}})


def another_process(run: FakeRun) -> FakeRun:
    return FakeRun("run", run.shared)


class Recorder(Reporter):
    """Remembers what was trained."""

    def __init__(self) -> None:
        self.trained: list[str] = []
        self.reports: list[StepReport] = []
        self.evaluations: list[EvaluationResult] = []
        self.events: list[tuple[int, str]] = []

    def step(self, report: StepReport) -> None:
        self.reports.append(report)
        self.trained += [received.group.lease.id for received in report.batch.groups]

    def evaluation(self, result: EvaluationResult) -> None:
        self.evaluations.append(result)

    def totals(self) -> dict[str, int]:
        return {"trained": len(self.trained)}

    def event(self, step: int, text: str) -> None:
        self.events.append((step, text))


class Actor(threading.Thread):
    """Answers leases at once, with the newest version, until it is stopped."""

    def __init__(self, run: FakeRun, *, heldout_reward: float = 0.5, is_wary: bool = False) -> None:
        """A wary one answers each lease only after a canary that it asked for."""
        super().__init__(daemon=True)
        self._run = another_process(run)
        self._heldout_reward = heldout_reward
        self._is_wary = is_wary
        self._stopping = threading.Event()
        self._seq = 0
        self.answered: list[str] = []

    def run(self) -> None:
        admission, sink = self._run.admission("a"), self._run.sink()
        while not self._stopping.wait(0.001):
            for lease in admission.lease(4):
                self._look_at_canary()
                version = self._run.weights.head() or 0
                rewards = (self._heldout_reward,) if lease.split == "heldout" else (0.0, 1.0)
                self._offer(sink, make_group(rewards=rewards, version=version, lease=lease))
                self.answered.append(lease.id)

    def _look_at_canary(self) -> None:
        if self._is_wary:
            self._run.canary.ask_canary()
        while self._is_wary and self._run.canary.is_canary_asked() and not self._stopping.wait(0.001):
            pass

    def _offer(self, sink, group: RolloutGroup) -> None:
        payload = encode_group(group)
        self._seq += 1
        descriptor = Descriptor("a.0", self._seq, group.lease, group.min_version, len(payload), 0.5)
        reply = sink.enqueue(descriptor, payload, epoch=self._run.run_store.state().epoch)
        assert reply.status is EnqueueStatus.OK, reply

    def stop(self) -> None:
        self._stopping.set()
        self.join(30)


class WatchedCanary:
    """The run's, and beside each canary that goes in the checksum of the policy's weights at that moment."""

    def __init__(self, run: FakeRun, policy: Policy) -> None:
        self._run, self._policy = run, policy
        self.canary, self.ask_canary = run.canary.canary, run.canary.ask_canary
        self.is_canary_asked = run.canary.is_canary_asked
        self.published: list[tuple[Canary, str, int | None]] = []

    def put_canary(self, record: bytes, *, fence: int) -> None:
        self._run.canary.put_canary(record, fence=fence)
        with ThreadPoolExecutor(1) as pool:
            checksum = State.of_torch(0, dict(self._policy.named_bf16())).checksum(pool)
        self.published.append((Canary.from_bytes(record), checksum, self._run.weights.head()))


class Stage:
    """One life of a learner on a run and a folder that outlive it."""

    def __init__(self, run: FakeRun, folder: Path, settings: RunConfig) -> None:
        self.run = run = another_process(run)
        self.recorder = Recorder()
        self.checkpoints = CheckpointStore(folder / "checkpoints")
        fence = self.checkpoints.take_fence()
        checkpoint = self.checkpoints.load_latest()
        state = checkpoint.state if checkpoint else LearnerState(
            step=0, version=0, consumed=0, next_index=0, watermarks={}, totals={}
        )  # fmt: skip
        self.policy = Policy.load(
            checkpoint.model_dir if checkpoint else folder / "model",
            revision=None, config=settings.learner, temperature=1.0, device=torch.device("cpu"),
        )  # fmt: skip
        if checkpoint:
            checkpoint.restore(self.policy)
        self.canary_store = WatchedCanary(run, self.policy)
        run.run_store.create(b"{}", {}, fence=fence)
        self.source = run.source(fence, RunLimits.of(settings))
        self.source.initialise(durable(state.watermarks, consumed=state.consumed, next_index=state.next_index))
        self.publisher = Publisher(run.weights_for(settings.weights), run_id="run", fence=fence)
        self.ingest = Ingest(self.source, settings, vocab_size=61, newest_version=lambda: self.publisher.newest_version)
        self.ingest.start()
        evaluation = Evaluation(self.source, settings.evaluation, num_rows=10)
        batcher = Batcher(
            self.ingest, self.source, evaluation, settings,
            watermarks=Watermarks(state.watermarks), consumed=state.consumed, next_index=state.next_index,
        )  # fmt: skip
        parts = LearnerParts(
            config=settings, fence=fence, policy=self.policy, trainer=Trainer(self.policy, settings), batcher=batcher,
            evaluation=evaluation, publisher=self.publisher,
            canary=LearnerCanary(
                self.canary_store, self.policy, [canary_sequence([1, 2], [3, 4])], identity=IDENTITY, fence=fence
            ), checkpoints=self.checkpoints, source=self.source,
            run_store=run.run_store, fleet=run.fleet, reporter=self.recorder,
        )  # fmt: skip
        head = run.weights.head()
        version = state.version if head is None else max(state.version, head) + 1
        self.learner = Learner(parts, step=state.step, version=version, resumed=checkpoint is not None)

    def close(self) -> None:
        self.publisher.close()
        self.ingest.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model_folder(tmp_path / "model")
    return tmp_path


@contextmanager
def acting(run: FakeRun, **settings: float) -> Iterator[Actor]:
    actor = Actor(run, **settings)
    actor.start()
    try:
        yield actor
    finally:
        actor.stop()


@contextmanager
def staged(run: FakeRun, folder: Path, settings: RunConfig) -> Iterator[Stage]:
    stage = Stage(run, folder, settings)
    try:
        yield stage
    finally:
        stage.close()


def test_a_run_trains_publishes_commits_and_finishes(folder: Path) -> None:
    run = FakeRun("run")
    with staged(run, folder, config()) as stage, acting(run) as actor:
        stage.learner.run()
    assert [report.step for report in stage.recorder.reports] == [1, 2, 3, 4, 5, 6]
    assert [report.version for report in stage.recorder.reports] == [1, 2, 3, 4, 5, 6]
    assert run.weights.head() == 6
    assert run.run_store.state().phase == "finished"
    assert Counter(stage.recorder.trained) == Counter(f"train:0:{i}" for i in range(12))
    assert max(int(report.batch.staleness(report.version - 1).max()) for report in stage.recorder.reports) <= 2
    # What was trained is gone from the queue, what was not is still there.
    assert stage.source.stats().queued == len(actor.answered) - 12
    assert [step for step, text in stage.recorder.events if text == "checkpoint"] == [0, 2, 4, 6]


class Crash(Exception):  # noqa: N818
    """Stands in for kill -9: nothing after it runs."""


class CrashingTrainer(Trainer):
    def __init__(self, policy: Policy, settings: RunConfig, *, at: int) -> None:
        super().__init__(policy, settings)
        self._left = at

    def step(self, groups, *, version):
        if self._left == 0:
            raise Crash
        self._left -= 1
        return super().step(groups, version=version)


@pytest.mark.parametrize("crash_after", [1, 2, 3, 5])
def test_a_crash_trains_every_group_once_in_the_surviving_history(folder: Path, crash_after: int) -> None:
    run = FakeRun("run")
    with acting(run):
        with staged(run, folder, config()) as first:
            crashing = CrashingTrainer(first.policy, config(), at=crash_after)
            object.__setattr__(first.learner._parts, "trainer", crashing)
            with pytest.raises(Crash):
                first.learner.run()
        with staged(run, folder, config()) as second:
            second.learner.run()
    survived = crash_after - crash_after % 2  # the last checkpoint
    history = first.recorder.trained[: survived * GROUPS_PER_STEP] + second.recorder.trained
    assert Counter(history) == Counter(f"train:0:{i}" for i in range(12))
    assert [report.step for report in second.recorder.reports] == list(range(survived + 1, 7))
    versions = [report.version for report in second.recorder.reports]
    assert min(versions) > max((report.version for report in first.recorder.reports), default=0)


def test_the_old_learner_can_do_nothing_once_a_new_one_came(folder: Path) -> None:
    run = FakeRun("run")
    with acting(run), staged(run, folder, config()) as first, staged(run, folder, config()) as second:
        with pytest.raises(FencedError):
            first.learner.run()
        second.learner.run()
    assert Counter(second.recorder.trained) == Counter(f"train:0:{i}" for i in range(12))


def test_evaluations_are_asked_in_time_and_the_target_ends_the_run(folder: Path) -> None:
    run = FakeRun("run")
    settings = config(evaluation={"every_steps": 2, "target": 0.5}, learner={"num_steps": 100})
    with staged(run, folder, settings) as stage, acting(run, heldout_reward=0.5):
        stage.learner.run()
    assert stage.recorder.evaluations[0].step == 0
    assert stage.recorder.evaluations[0].reward == 0.5
    assert len(stage.recorder.reports) < 100
    assert run.run_store.state().phase == "finished"


def test_the_last_evaluation_is_waited_for(folder: Path) -> None:
    run = FakeRun("run")
    settings = config(evaluation={"every_steps": 4}, learner={"num_steps": 6})
    with staged(run, folder, settings) as stage, acting(run):
        stage.learner.run()
    assert [result.step for result in stage.recorder.evaluations] == [0, 4, 6]


def test_a_stopped_learner_leaves_a_run_that_goes_on(folder: Path) -> None:
    run = FakeRun("run")
    with acting(run):
        with staged(run, folder, config()) as first:
            first.learner.stop()
            first.learner.run()
        assert run.run_store.state().phase == "running"
        with staged(run, folder, config()) as second:
            second.learner.run()
    assert Counter(first.recorder.trained + second.recorder.trained) == Counter(f"train:0:{i}" for i in range(12))


def test_a_queue_half_full_of_uncommitted_groups_forces_a_checkpoint(folder: Path) -> None:
    run = FakeRun("run")
    settings = config(learner={"num_steps": 4, "checkpoint_every": 100}, broker={"max_bytes": 6_000})
    with staged(run, folder, settings) as stage, acting(run):
        stage.learner.run()
    assert len([step for step, text in stage.recorder.events if text == "checkpoint" and 0 < step < 4]) > 0


def test_no_actor_is_an_error_after_the_deadline(folder: Path) -> None:
    run = FakeRun("run")
    with (
        staged(run, folder, config(learner={"data_timeout_s": 0.05})) as stage,
        pytest.raises(BrokerUnavailable, match="is an actor alive"),
    ):
        stage.learner.run()


def test_a_learner_that_waits_for_groups_can_be_stopped(folder: Path) -> None:
    run = FakeRun("run")
    with staged(run, folder, config()) as stage:
        running = threading.Thread(target=stage.learner.run)
        running.start()
        stage.learner.stop()
        running.join(30)
        assert not running.is_alive()
    assert [text for _, text in stage.recorder.events] == ["checkpoint", "suspended"]


def test_a_canary_is_of_the_weights_that_are_out(folder: Path) -> None:
    """Whenever it is asked for, the policy is the newest published version, never one update ahead of it."""
    run = FakeRun("run")
    settings = config(learner={"lr": 1e-2}, evaluation={"every_steps": 4})
    with staged(run, folder, settings) as stage, acting(run, is_wary=True):
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
    with staged(run, folder, config()) as stage:
        running = threading.Thread(target=stage.learner.run, daemon=True)
        running.start()
        try:
            run.canary.ask_canary()
            wait_for(lambda: run.run_store.state().phase == "running" and not run.canary.is_canary_asked())
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
