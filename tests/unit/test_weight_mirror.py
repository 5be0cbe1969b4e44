"""What the learner publishes, judged by what followers make of it."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lambdapo_async.config.weights import WeightsConfig
from lambdapo_async.errors import ConfigError
from lambdapo_async.weights.catch_up import plan_catch_up
from lambdapo_async.weights.delta_file import read_delta, read_full
from lambdapo_async.weights.state import State
from lambdapo_async.weights.tensor_file import BitTensor
from learner.weight_mirror import WeightMirror
from tests.fakes_broker import FakeRun
from tests.fakes_weight_store import FakeWeightStore

RUN = "run-1"
MAX_BYTES = 2**24
SIZES = {"embed": 30_000, "layer.0": 900, "layer.1": 901}


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as threads:
        yield threads


class Training:
    """Weights that change a little with every step, and what each version was."""

    def __init__(self, changes: int = 20) -> None:
        self._random = np.random.default_rng(0)
        self._changes = changes
        self.bits = {name: self._random.integers(0, 2**16, size, dtype=np.uint16) for name, size in SIZES.items()}
        self.history: dict[int, dict[str, bytes]] = {}

    def step(self) -> None:
        for bits in self.bits.values():
            at = self._random.choice(bits.size, min(self._changes, bits.size), replace=False)
            bits[at] += self._random.integers(1, 9, at.size, dtype=np.uint16)

    def state(self, version: int) -> State:
        state = State(version, {name: BitTensor("BF16", bits.shape, bits.copy()) for name, bits in self.bits.items()})
        self.history[version] = contents(state)
        return state


def contents(state: State) -> dict[str, bytes]:
    return {name: tensor.bits.tobytes() for name, tensor in state.tensors.items()}


class Learner:
    """One incarnation: trains, prepares, publishes."""

    def __init__(self, store: FakeWeightStore, training: Training, pool: ThreadPoolExecutor, **settings: float) -> None:
        self.store, self.training = store, training
        self.mirror = WeightMirror(run_id=RUN, config=WeightsConfig(**settings), pool=pool)
        self.kinds: dict[int, str] = {}

    def publish(self, version: int, *, steps: int = 1) -> None:
        for _ in range(steps):
            self.training.step()
        release = self.mirror.prepare(self.training.state(version), head=self.store.head())
        self.store.publish(version, release.files, consumed=0, fence=1)
        self.mirror.advance(release)
        self.kinds[version] = " ".join(
            "full" if file.available.base_version is None else "step" if file.available.base_min is None else "union"
            for file in release.files
        )


class Follower:
    """Holds a mirror and brings it to the head by the cheapest plan."""

    def __init__(self, store: FakeWeightStore, pool: ThreadPoolExecutor) -> None:
        self._store, self._pool = store, pool
        self.state: State | None = None
        self.files_taken = 0

    def catch_up(self) -> dict[str, bytes]:
        head = self._store.head()
        assert head is not None
        plan = plan_catch_up(self._store.files(), at=self.state.version if self.state else None, head=head)
        for file in plan.files:
            payload, self.files_taken = self._store.fetch(file), self.files_taken + 1
            if file.base_version is None:
                self.state = read_full(payload, run_id=RUN, version=file.version, max_bytes=MAX_BYTES, pool=self._pool)
            else:
                assert self.state is not None
                delta = read_delta(payload, max_bytes=MAX_BYTES)
                delta.apply_to(self.state, run_id=RUN, version=file.version, pool=self._pool)
        assert self.state is not None
        return contents(self.state)


@pytest.fixture
def store() -> FakeWeightStore:
    run = FakeRun()
    run.run_store.create(b"{}", {}, fence=1)
    return run.weights_for(WeightsConfig(grace_s=0))


def test_every_kind_of_follower_ends_at_the_learners_bits(store: FakeWeightStore, pool: ThreadPoolExecutor) -> None:
    """One follows every version, one skips, one comes late, one sleeps through 56 versions."""
    learner = Learner(store, Training(changes=100), pool, keyframe_share=0.2)
    follower, skipper, sleeper = (Follower(store, pool) for _ in range(3))
    for version in range(60):
        learner.publish(version)
        truth = learner.training.history[version]
        assert follower.catch_up() == truth
        if version % 3 == 0:
            assert skipper.catch_up() == truth
        if version in (2, 59):
            assert sleeper.catch_up() == truth
    assert Follower(store, pool).catch_up() == truth
    assert follower.files_taken == 60
    assert learner.kinds[0] == "full"
    assert learner.kinds[8] == learner.kinds[16] == "step union"
    assert {learner.kinds[version] for version in (1, 2, 7, 9)} == {"step"}
    assert "full step" in learner.kinds.values()  # a fifth of the elements had changed


def test_a_difference_is_from_the_last_published_version_not_the_last_step(
    store: FakeWeightStore, pool: ThreadPoolExecutor
) -> None:
    learner, follower = Learner(store, Training(), pool), Follower(store, pool)
    for number in range(5):
        learner.publish(number, steps=4)
        assert follower.catch_up() == learner.training.history[number]
    assert [learner.kinds[number] for number in range(1, 5)] == ["step"] * 4


def test_version_numbers_may_have_holes(store: FakeWeightStore, pool: ThreadPoolExecutor) -> None:
    learner, follower = Learner(store, Training(), pool), Follower(store, pool)
    for version in (3, 7, 8, 20):
        learner.publish(version)
        assert follower.catch_up() == learner.training.history[version]
    assert learner.kinds[20] == "step"


def test_the_mirror_does_not_advance_with_a_publish_that_failed(
    store: FakeWeightStore, pool: ThreadPoolExecutor
) -> None:
    learner, follower = Learner(store, Training(), pool), Follower(store, pool)
    learner.publish(0)
    follower.catch_up()
    learner.training.step()
    lost = learner.mirror.prepare(learner.training.state(1), head=store.head())
    assert lost.files  # and never published
    learner.publish(1)
    assert learner.kinds[1] == "step"
    assert follower.catch_up() == learner.training.history[1]


def test_unions_cover_versions_prepared_around_a_failed_one(store: FakeWeightStore, pool: ThreadPoolExecutor) -> None:
    learner, sleeper = Learner(store, Training(), pool), Follower(store, pool)
    learner.publish(0)
    learner.publish(1)
    sleeper.catch_up()
    learner.training.step()
    learner.mirror.prepare(learner.training.state(2), head=store.head())
    for version in range(2, 17):
        learner.publish(version)
    assert sleeper.catch_up() == learner.training.history[16]
    assert sleeper.files_taken < 10


@pytest.mark.parametrize("head", [None, 0, 2], ids=["empty", "rolled back", "a publish that seemed to fail"])
def test_a_head_that_is_not_ours_makes_a_keyframe(pool: ThreadPoolExecutor, head: int | None) -> None:
    training = Training()
    mirror = WeightMirror(run_id=RUN, config=WeightsConfig(), pool=pool)
    mirror.advance(mirror.prepare(training.state(0), head=None))
    mirror.advance(mirror.prepare(training.state(1), head=0))
    release = mirror.prepare(training.state(3), head=head)
    assert [file.available.base_version for file in release.files] == [None]


def test_a_restart_begins_with_a_keyframe_and_never_replays_a_chain(
    store: FakeWeightStore, pool: ThreadPoolExecutor
) -> None:
    training, follower, sleeper = Training(), Follower(store, pool), Follower(store, pool)
    first = Learner(store, training, pool)
    for version in range(4):
        first.publish(version)
        follower.catch_up()
        if version == 1:
            sleeper.catch_up()
    training.bits["embed"][:] = 7  # the checkpoint was older than the head
    second = Learner(store, training, pool)
    second.publish(4)
    second.publish(5)
    assert (second.kinds[4], second.kinds[5]) == ("full", "step")
    assert follower.catch_up() == sleeper.catch_up() == training.history[5]
    assert Follower(store, pool).catch_up() == training.history[5]
    assert min(file.version for file in store.files()) == 4


def test_another_structure_makes_a_keyframe(store: FakeWeightStore, pool: ThreadPoolExecutor) -> None:
    learner, follower = Learner(store, Training(), pool), Follower(store, pool)
    learner.publish(0)
    follower.catch_up()
    learner.training.bits["new"] = np.zeros(10, np.uint16)
    learner.publish(1)
    del learner.training.bits["layer.0"]
    learner.publish(2)
    learner.training.bits["new"] = np.zeros(11, np.uint16)
    learner.publish(3)
    assert set(learner.kinds.values()) == {"full"}
    assert follower.catch_up() == learner.training.history[3]


def test_nothing_changed_is_a_version_too(store: FakeWeightStore, pool: ThreadPoolExecutor) -> None:
    learner, follower = Learner(store, Training(changes=0), pool), Follower(store, pool)
    for version in range(10):
        learner.publish(version)
        assert follower.catch_up() == learner.training.history[version]
    assert "full" not in learner.kinds[9]


def test_versions_that_change_everywhere_go_out_whole(store: FakeWeightStore, pool: ThreadPoolExecutor) -> None:
    training = Training(changes=30_000)
    learner, follower = Learner(store, training, pool), Follower(store, pool)
    for version in range(3):
        learner.publish(version)
        assert follower.catch_up() == training.history[version]
    assert learner.kinds[2] == "full"
    training._changes = 2
    for version in range(3, 5):
        learner.publish(version)
        assert follower.catch_up() == training.history[version]
    assert learner.kinds[4] == "step"


def test_a_tight_budget_makes_keyframes_in_time(pool: ThreadPoolExecutor) -> None:
    """Whatever happens, the old keyframe, what follows it and the new one fit side by side."""
    training = Training()
    run = FakeRun()
    run.run_store.create(b"{}", {}, fence=1)
    keyframe_bytes = WeightMirror(run_id=RUN, config=WeightsConfig(), pool=pool).prepare(
        training.state(0), head=None
    ).num_bytes  # fmt: skip
    budget = {"max_redis_bytes": int(2.05 * keyframe_bytes)}
    store = run.weights_for(WeightsConfig(**budget))
    learner, follower = Learner(store, training, pool, **budget), Follower(store, pool)
    for version in range(30):
        learner.publish(version)
        assert follower.catch_up() == training.history[version]
        assert sum(file.num_bytes for file in store.files()) <= budget["max_redis_bytes"]
    assert sum("full" in kind for kind in learner.kinds.values()) > 2


def test_a_budget_below_two_keyframes_is_refused_at_once(store: FakeWeightStore, pool: ThreadPoolExecutor) -> None:
    with pytest.raises(ConfigError, match=r"max_redis_bytes = 1000 cannot hold two keyframes"):
        Learner(store, Training(), pool, max_redis_bytes=1000).publish(0)
