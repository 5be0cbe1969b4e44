"""Whatever Redis forgets in the middle of a run, every prompt is trained on once and every version stays unique."""

import copy
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lambdapo_async.broker.interface import Durable
from lambdapo_async.config import RunConfig
from lambdapo_async.errors import BrokerUnavailable, FencedError
from lambdapo_async.journal.records import VersionRecord
from lambdapo_async.metrics import EVAL, STEP
from lambdapo_async.weights.catch_up import plan_catch_up
from lambdapo_async.weights.delta_file import read_full
from lambdapo_async.weights.state import State
from learner.fence import take_fence
from tests.fakes_broker import FakeRun
from tests.fakes_redis_run import FakeRedisRun
from tests.learner_stage import Stage, acting, journal_of, rows_of, stage_config, staged, trained_in
from tests.resumed_run import newest
from tests.tiny_models import tiny_model_folder

_LASTING = ("lock", "canary")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(tmp_path: Path, model: Path) -> Path:
    (tmp_path / "model").symlink_to(model)
    return tmp_path


def memory(state: FakeRedisRun) -> dict[str, object]:
    return {f.name: getattr(state, f.name) for f in fields(state) if f.name not in _LASTING}


def become(state: FakeRedisRun, content: dict[str, object]) -> None:
    with state.lock:
        for name, value in content.items():
            setattr(state, name, value)


class Redis:
    """Forgets on demand."""

    def __init__(self, run: FakeRun) -> None:
        self.state = run.shared
        self._earlier = memory(FakeRedisRun())

    def remember(self) -> None:
        with self.state.lock:
            self._earlier = copy.deepcopy(memory(self.state))

    def lose_everything(self) -> None:
        become(self.state, memory(FakeRedisRun()))

    def go_back(self) -> None:
        become(self.state, {**copy.deepcopy(self._earlier), "is_open": False})

    def restart(self) -> None:
        self.state.restart()


def at_step(stage: Stage, step: int, happen: Callable[[], None], *, before: bool = True) -> None:
    """Something happens while the learner trains, before or after the step is taken."""
    train = stage.parts.stepper.train

    def eventful(batch):
        is_due = stage.parts.stepper.step + 1 == step
        if is_due and before:
            happen()
        trained = train(batch)
        if is_due and not before:
            happen()
        return trained

    stage.parts.stepper.train = eventful


def live(run: FakeRun, folder: Path, config: RunConfig, disturb: Callable[[Stage], None]) -> None:
    with acting(run, config), staged(run, folder, config) as stage:
        disturb(stage)
        stage.learner.run()


def assert_nothing_lost(folder: Path, num_groups: int = 12) -> None:
    assert Counter(trained_in(folder)) == Counter(f"train:0:{i}" for i in range(num_groups))
    versions = [record.version for _, record in journal_of(folder) if isinstance(record, VersionRecord)]
    assert versions == sorted(set(versions)), "a version number was used twice"


def published_state(run: FakeRun) -> State:
    """What a new actor would build of the head, which must be whole."""
    head = run.weights.head()
    (keyframe,) = [file for file in run.weights.files() if file.version == head and file.base_version is None]
    assert head is not None
    with ThreadPoolExecutor(1) as pool:
        return read_full(run.weights.fetch(keyframe), run_id="run", version=head, max_bytes=10**9, pool=pool)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("loss", ["lose_everything", "go_back", "restart"])
def test_a_run_goes_on_after_redis_forgot(folder: Path, loss: str, before: bool) -> None:
    run, config = FakeRun("run"), stage_config(evaluation={"every_steps": 3})
    redis = Redis(run)
    with staged(run, folder, config) as stage, acting(run, config):
        at_step(stage, 2, redis.remember)
        at_step(stage, 4, getattr(redis, loss), before=before)
        stage.learner.run()
    assert_nothing_lost(folder)
    assert run.run_store.state().phase == "finished"
    assert run.run_store.config_json()
    assert [run.run_store.num_rows(split) for split in ("train", "heldout")] == [20, 20]
    assert [row.step for row in rows_of(folder, STEP)] == [1, 2, 3, 4, 5, 6]
    assert {row.step for row in rows_of(folder, EVAL)} == {0, 3, 6}
    plan_catch_up(run.weights.files(), at=None, head=run.weights.head())
    assert run.weights.head() == max(r.version for _, r in journal_of(folder) if isinstance(r, VersionRecord))


def test_weights_come_back_whole_under_a_new_number(folder: Path) -> None:
    run, config = FakeRun("run"), stage_config(learner={"num_steps": 3})
    with staged(run, folder, config) as stage, acting(run, config), ThreadPoolExecutor(1) as pool:
        at_step(stage, 3, Redis(run).lose_everything)
        publisher, seen = stage.parts.resync.publisher, []
        republish = publisher.republish

        def watched(version: int, *, consumed: int) -> None:
            republish(version, consumed=consumed)
            seen.append((version, published_state(run).checksum(pool) == publisher.newest_state().checksum(pool)))

        publisher.republish = watched
        stage.learner.run()
        final = State.of_torch(0, dict(stage.policy.named_bf16())).checksum(pool)
        assert publisher.newest_state().checksum(pool) == final
    assert all(is_equal for _, is_equal in seen)
    # Before the third step's weights were on their way, or after, or they were the first whole ones by themselves.
    assert [version for version, _ in seen] in ([], [3], [4])
    assert run.weights.head() == 3 + len(seen)
    plan_catch_up(run.weights.files(), at=None, head=3 + len(seen))


def test_only_weights_that_were_on_their_way_are_published_again(folder: Path) -> None:
    run, config = FakeRun("run"), stage_config()
    with staged(run, folder, config) as stage, acting(run, config):
        at_step(stage, 4, Redis(run).restart)  # with all its data
        stage.learner.run()
    assert run.weights.head() in (6, 7)
    plan_catch_up(run.weights.files(), at=None, head=run.weights.head())


def test_redis_may_be_away_for_a_while(folder: Path) -> None:
    run, config = FakeRun("run"), stage_config()
    with staged(run, folder, config) as stage, acting(run, config):
        read, calls = stage.source.read, Counter[str]()

        def away(max_groups: int, *, timeout_s: float):
            calls["all"] += 1
            if 5 <= calls["all"] < 8:
                raise BrokerUnavailable("no answer")
            return read(max_groups, timeout_s=timeout_s)

        stage.source.read = away
        stage.learner.run()
    assert calls["all"] >= 8
    assert_nothing_lost(folder)


def test_it_is_not_waited_for_for_ever(folder: Path) -> None:
    run, config = FakeRun("run"), stage_config(broker={"outage_s": 0.05})

    def disturb(stage: Stage) -> None:
        at_step(stage, 2, lambda: setattr(stage.source, "initialise", _unavailable))
        at_step(stage, 2, Redis(run).restart)

    with pytest.raises(BrokerUnavailable, match="still no answer"):
        live(run, folder, config, disturb)


def test_each_of_several_outages_is_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one batch is waited for they come further apart than one may last."""
    run, config = FakeRun("run"), stage_config(broker={"outage_s": 60.0})
    now_s = 0.0
    monkeypatch.setattr("learner.resync.time", SimpleNamespace(monotonic=lambda: now_s))
    with staged(run, folder, config) as stage, acting(run, config):
        read, calls = stage.source.read, Counter[str]()

        def away_twice(max_groups: int, *, timeout_s: float):
            nonlocal now_s
            calls["all"] += 1
            if calls["all"] in (5, 6):
                now_s += 100.0
                raise BrokerUnavailable("no answer")
            return read(max_groups, timeout_s=timeout_s)

        stage.source.read = away_twice
        stage.learner.run()
    assert calls["all"] > 6
    assert_nothing_lost(folder)


@pytest.mark.parametrize("loss", ["lose_everything", "restart"])
def test_a_run_is_suspended_while_redis_is_away(folder: Path, loss: str) -> None:
    """Its steps are on this machine: who stops a learner because Redis is broken gets a checkpoint."""
    run, config = FakeRun("run"), stage_config(learner={"checkpoint_every": 100})

    def disturb(stage: Stage) -> None:
        at_step(stage, 3, getattr(Redis(run), loss))
        at_step(stage, 3, stage.learner.stop)

    live(run, folder, config, disturb)
    assert newest(folder).state.step == 3
    live(FakeRun("run"), folder, config, lambda _: None)
    assert_nothing_lost(folder)


def _unavailable(durable: Durable) -> None:
    raise BrokerUnavailable("still no answer")


def test_a_learner_that_was_replaced_does_not_take_an_empty_redis_over(folder: Path) -> None:
    run, config = FakeRun("run"), stage_config()

    def disturb(stage: Stage) -> None:
        at_step(stage, 2, Redis(run).lose_everything)
        at_step(stage, 2, lambda: take_fence(folder / "checkpoints"))

    with pytest.raises(FencedError):
        live(run, folder, config, disturb)
    assert run.shared.fence is None


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    losses=st.lists(
        st.tuples(
            st.sampled_from(["lose_everything", "go_back", "restart", "remember"]), st.integers(1, 6), st.booleans()
        ),
        min_size=1,
        max_size=5,
    ),
    reuse=st.booleans(),
)
def test_any_series_of_losses(
    tmp_path_factory: pytest.TempPathFactory, model: Path, losses: list[tuple[str, int, bool]], reuse: bool
) -> None:
    folder = tmp_path_factory.mktemp("run")
    (folder / "model").symlink_to(model)
    torch.manual_seed(0)
    replay = {"max_uses": 2} if reuse else {}
    run, config = FakeRun("run"), stage_config(replay=replay)
    redis = Redis(run)
    with staged(run, folder, config) as stage, acting(run, config):
        for loss, step, before in losses:
            at_step(stage, step, getattr(redis, loss), before=before)
        running = threading.Thread(target=stage.learner.run)
        running.start()
        running.join(60)
        assert not running.is_alive(), "the run hangs"
    uses = Counter(trained_in(folder))
    assert sum(uses.values()) == 12
    assert max(uses.values()) <= (2 if reuse else 1)
    assert rows_of(folder, STEP)[-1].step == 6
    if not reuse:
        assert_nothing_lost(folder)
