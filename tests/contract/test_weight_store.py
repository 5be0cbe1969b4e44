"""Every weight store keeps the same promises: in memory, in Redis, and on a disk behind Redis."""

import dataclasses
import threading
from pathlib import Path

import pytest

from lambdapo_async.broker.interface import WeightStore
from lambdapo_async.config.weights import WeightsConfig
from lambdapo_async.errors import FencedError, LostDataError, WeightsError, WeightsGoneError
from lambdapo_async.weights.manifest import NewFile
from tests.contract.broker_world import FOREVER_S, LIMITS, start
from tests.fakes_broker import FakeRun
from tests.fakes_redis_run import FakeRedisRun
from tests.redis_fixtures import BrokerRun, OpenRun
from tests.weight_files import full, names, publish, step, union


@dataclasses.dataclass
class World:
    """A run, and how its learner's stores are configured."""

    run: BrokerRun
    reader: BrokerRun
    config: WeightsConfig

    def store(self, **settings: float) -> WeightStore:
        """One more learner's store."""
        return self.run.weights_for(self.config.model_copy(update=settings))


def _open_fakes() -> OpenRun[BrokerRun]:
    shared = FakeRedisRun()
    return lambda: FakeRun("test", shared)


@pytest.fixture(params=["fake", "redis", "file", "memory"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    """``memory`` is fsspec's own filesystem of that name: like S3 and GCS, it is no disk."""
    is_elsewhere = request.param in ("file", "memory")
    config = WeightsConfig(store=f"{request.param}://{tmp_path}") if is_elsewhere else WeightsConfig()
    opener = _open_fakes() if request.param == "fake" else request.getfixturevalue("open_redis_run")
    run = opener()
    start(run)
    return World(run, opener(), config)


def test_every_file_is_fetched_as_it_was_published(world: World) -> None:
    large = bytes(range(256)) * 20_000
    assert (world.reader.weights.head(), world.reader.weights.files()) == (None, ())
    published = [full(4, large), step(5, b"s"), union(5, 4, b"u")]
    publish(world.store(), published[0])
    publish(world.store(), *published[1:])
    assert world.reader.weights.head() == 5
    assert world.reader.weights.files() == tuple(file.available for file in published)
    for file in published:
        assert world.reader.weights.fetch(file.available) == file.payload


@pytest.mark.parametrize("version", [3, 4])
def test_the_head_only_rises(world: World, version: int) -> None:
    publish(world.store(), full(4, b"four"))
    with pytest.raises(WeightsError, match="not above the head 4"):
        publish(world.store(), full(version, b"other"))
    assert (world.reader.weights.head(), names(world.reader.weights)) == (4, [(4, None, None)])
    assert world.reader.weights.fetch(full(4, b"four").available) == b"four"


def test_a_step_from_what_is_not_the_head_any_more_is_not_listed(world: World) -> None:
    publish(world.store(), full(4, b"four"))
    with pytest.raises(LostDataError):
        publish(world.store(), step(6))
    assert (world.reader.weights.head(), names(world.reader.weights)) == (4, [(4, None, None)])
    publish(world.store(), full(6), step(6))  # whole, whatever the step leads from
    assert world.reader.weights.head() == 6


@pytest.mark.parametrize("files", [[], [full(1), full(2)], [full(1), full(1)]], ids=["none", "two versions", "twice"])
def test_a_version_is_one_set_of_files(world: World, files: list[NewFile]) -> None:
    with pytest.raises(WeightsError, match="version 1 cannot consist of"):
        world.store().publish(1, files, consumed=0, fence=1)
    assert world.reader.weights.head() is None


def test_what_was_never_published_is_gone(world: World) -> None:
    publish(world.store(), full(1))
    with pytest.raises(WeightsGoneError, match=r"2\.step is gone: the head is 1"):
        world.reader.weights.fetch(step(2).available)


def test_waiting_for_a_newer_version(world: World) -> None:
    store = world.reader.weights
    assert store.wait_newer(-1, timeout_s=0.01) is None
    publish(world.store(), full(0))
    assert store.wait_newer(-1, timeout_s=FOREVER_S) == 0
    assert store.wait_newer(0, timeout_s=0.01) is None
    found: list[int | None] = []
    waiter = threading.Thread(target=lambda: found.append(store.wait_newer(0, timeout_s=FOREVER_S)))
    waiter.start()
    publish(world.store(), step(1))
    waiter.join(FOREVER_S)
    assert found == [1]


def test_a_publish_opens_the_gate(world: World) -> None:
    admission = world.run.admission("a")
    assert len(admission.lease(9)) == LIMITS.capacity
    publish(world.store(), full(1), consumed=1)
    assert len(admission.lease(9)) == 1


def test_an_old_learner_cannot_publish(world: World) -> None:
    publish(world.store(), full(1))
    world.reader.run_store.create(b"{}", {}, fence=2)
    with pytest.raises(FencedError):
        publish(world.store(), step(2), fence=1)
    publish(world.store(), full(2, b"new"), fence=2)
    assert world.reader.weights.fetch(full(2, b"new").available) == b"new"


def test_superseded_files_go_after_the_grace_period(world: World) -> None:
    patient, hasty = world.store(grace_s=3600.0), world.store(grace_s=0.0)
    publish(patient, full(1))
    publish(patient, full(2))
    publish(patient, step(3))
    assert names(world.reader.weights) == [(1, None, None), (2, None, None), (3, 2, None)]
    publish(hasty, step(4))
    assert names(world.reader.weights) == [(2, None, None), (3, 2, None), (4, 3, None)]
    with pytest.raises(WeightsGoneError, match=r"1\.full is gone"):
        world.reader.weights.fetch(full(1).available)


@pytest.fixture
def budgeted(world: World) -> WeightStore:
    if world.config.budget_bytes is None:
        pytest.skip("only Redis has a budget")
    return world.store(max_redis_bytes=110, grace_s=3600.0)


def test_the_byte_budget_holds_at_every_moment(budgeted: WeightStore) -> None:
    publish(budgeted, full(0, bytes(30)))
    for version in range(1, 20):
        files = [step(version, bytes(4))]
        if version % 8 == 0:
            files.append(union(version, 0, bytes(20)))
        publish(budgeted, *files)
        assert sum(file.num_bytes for file in budgeted.files()) <= 110
    publish(budgeted, full(20, bytes(30)))
    assert sum(file.num_bytes for file in budgeted.files()) <= 110
    assert (20, None, None) in names(budgeted)


def test_what_does_not_fit_is_refused_and_nothing_is_lost(budgeted: WeightStore) -> None:
    publish(budgeted, full(0, bytes(60)))
    with pytest.raises(WeightsError, match="raise it to at least 120"):
        publish(budgeted, full(1, bytes(60)))
    assert (budgeted.head(), names(budgeted)) == (0, [(0, None, None)])
