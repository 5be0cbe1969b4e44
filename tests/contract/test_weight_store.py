"""Every weight store keeps the same promises: in memory, in Redis, and on a disk behind Redis."""

import contextlib
import dataclasses
import importlib.abc
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from lambdapo_async.broker.connection import connect
from lambdapo_async.broker.interface import WeightStore
from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.config.weights import WeightsConfig
from lambdapo_async.errors import ConfigError, FencedError, LostDataError, WeightsError
from lambdapo_async.weights.fsspec_store import read_file
from lambdapo_async.weights.manifest import CHUNK_BYTES, Manifest, NewFile
from tests.contract.broker_world import FOREVER_S, LIMITS, start
from tests.fakes_broker import FakeRun
from tests.fakes_redis_run import FakeRedisRun
from tests.lossy_proxy import LossyProxy, lossy_proxy
from tests.redis_fixtures import TIMEOUT_S, BrokerRun, OpenRun
from tests.weight_files import full, step, union


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


@pytest.fixture
def server(redis_url: str) -> Iterator[redis.Redis]:
    """Redis itself, behind the broker's back."""
    with contextlib.closing(connect(redis_url, timeout_s=TIMEOUT_S)) as client:
        yield client


@pytest.fixture
def started(redis_run: RedisRun) -> RedisRun:
    start(redis_run)
    return redis_run


def publish(store: WeightStore, *files: NewFile, consumed: int = 0, fence: int = 1) -> None:
    store.publish(files[0].available.version, files, consumed=consumed, fence=fence)


def names(store: WeightStore) -> list[tuple[int, int | None, int | None]]:
    return [(file.version, file.base_version, file.base_min) for file in store.files()]


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
    with pytest.raises(WeightsError, match=r"2\.step is gone: the head is 1"):
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
    with pytest.raises(WeightsError, match=r"1\.full is gone"):
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


def test_a_publish_whose_replies_are_lost_happens_once(redis_url: str, started: RedisRun, server: redis.Redis) -> None:
    keys = started.keys
    with (
        tempfile.TemporaryDirectory() as folder,
        lossy_proxy(Path(folder), redis_url) as proxy,
        contextlib.closing(RedisRun(proxy.url, keys.run_id, timeout_s=TIMEOUT_S)) as shaky,
    ):
        shaky.fleet.members()  # connected: what is lost from here on is a reply to a call
        for version in range(1, 4):
            proxy.lose_replies(version)
            publish(shaky.weights, full(version, b"v%d" % version), consumed=version)
            assert started.weights.fetch(full(version, b"v%d" % version).available) == b"v%d" % version
        assert proxy.lost == 6
    assert server.xlen(keys.weights_log) == 3
    assert names(started.weights) == [(version, None, None) for version in (1, 2, 3)]


def test_a_connection_that_breaks_between_chunks_costs_those_chunks(redis_url: str, started: RedisRun) -> None:
    payload = bytes(range(256)) * (20 * CHUNK_BYTES // 256)
    publish(started.weights, full(1, payload))
    with tempfile.TemporaryDirectory() as folder, lossy_proxy(Path(folder), redis_url) as proxy:
        assert _fetched_while_losing(proxy, started.keys.run_id, full(1, payload), replies=3) == payload


def _fetched_while_losing(proxy: LossyProxy, run_id: str, file: NewFile, *, replies: int) -> bytes:
    with contextlib.closing(RedisRun(proxy.url, run_id, timeout_s=TIMEOUT_S)) as shaky:
        shaky.fleet.members()
        proxy.lose_replies(replies)
        payload = shaky.weights.fetch(file.available)
        assert proxy.lost == replies
        return payload


@pytest.mark.parametrize("damage", ["flip", "cut", "lose"])
def test_a_damaged_chunk_is_named(started: RedisRun, server: redis.Redis, damage: str) -> None:
    file = full(1, bytes(2 * CHUNK_BYTES + 5))
    publish(started.weights, file)
    chunk = started.keys.weights_chunk("1.full", 1)
    match damage:
        case "flip":
            server.setrange(chunk, 12_345, b"\x01")
        case "cut":
            server.set(chunk, bytes(CHUNK_BYTES - 1))
        case "lose":
            server.delete(chunk)
    with pytest.raises(WeightsError, match=r"chunk 1 of 1\.full is"):
        started.weights.fetch(file.available)


@pytest.mark.parametrize("content", [b"garbage", b"\xc1", b"\x80"])
def test_a_damaged_manifest_is_named(started: RedisRun, server: redis.Redis, content: bytes) -> None:
    publish(started.weights, full(1))
    server.hset(started.keys.weights_begun, "1.full", content)
    with pytest.raises(WeightsError, match=r"manifest of 1\.full is damaged"):
        started.weights.fetch(full(1).available)


@pytest.mark.parametrize("content", [b"garbage", b"\xc1", b"\x93\x01\x02\x03"])
def test_a_damaged_list_is_an_error(started: RedisRun, server: redis.Redis, content: bytes) -> None:
    server.hset(started.keys.weights_files, "1.full", content)
    with pytest.raises(WeightsError, match="the list of weight files is damaged"):
        started.weights.files()


def test_a_file_that_is_read_stays_until_its_reader_is_done(started: RedisRun, server: redis.Redis) -> None:
    keys = started.keys
    store = started.weights_for(WeightsConfig(grace_s=0))
    publish(store, full(1))
    server.zadd(keys.weights_readers, {"1.full|slow": 1e15})
    for version in (2, 3):
        publish(store, full(version))
    assert names(store) == [(2, None, None), (3, None, None)]
    store._keep("1.full", "slow")  # who holds it goes on, ...
    assert server.get(keys.weights_chunk("1.full", 0)) == b"whole"
    with pytest.raises(WeightsError, match=r"1\.full is gone"):
        store.fetch(full(1).available)  # ... and nobody joins
    server.zrem(keys.weights_readers, "1.full|slow")
    publish(store, full(4))
    assert server.exists(keys.weights_chunk("1.full", 0), keys.weights_chunk("2.full", 0)) == 0
    assert sorted(server.hkeys(keys.weights_begun)) == [b"3.full", b"4.full"]


def test_a_fetch_leaves_no_reader_behind(started: RedisRun, server: redis.Redis) -> None:
    file = full(1, bytes(20 * CHUNK_BYTES))
    publish(started.weights, file)
    started.weights.fetch(file.available)
    assert server.zcard(started.keys.weights_readers) == 0


class CrashError(Exception):
    """The learner died here."""


@pytest.mark.parametrize("place", ["redis", "file"])
def test_a_crash_before_the_head_leaves_nothing(
    started: RedisRun, server: redis.Redis, tmp_path: Path, place: str
) -> None:
    """The next learner publishes the same number, from another incarnation."""
    keys = started.keys
    config = WeightsConfig(store="redis" if place == "redis" else f"file://{tmp_path}")
    store = started.weights_for(config)

    def crash(*_: object) -> None:
        raise CrashError

    store._flip = crash
    with pytest.raises(CrashError):
        publish(store, full(1, bytes(3 * CHUNK_BYTES)))
    assert (started.weights.head(), started.weights.files()) == (None, ())
    started.run_store.create(b"{}", {}, fence=2)
    heir = started.weights_for(config)
    publish(heir, full(1, b"new"), fence=2)
    assert heir.fetch(full(1, b"new").available) == b"new"
    assert server.hkeys(keys.weights_begun) == [b"1.full"]
    on_disk = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    in_redis = [server.exists(keys.weights_chunk("1.full", index)) for index in range(3)]
    assert (on_disk, in_redis) == (([], [1, 0, 0]) if place == "redis" else ([b"new"], [0, 0, 0]))


def test_on_a_disk_redis_holds_no_payload(started: RedisRun, server: redis.Redis, tmp_path: Path) -> None:
    publish(started.weights_for(WeightsConfig(store=f"file://{tmp_path}")), full(1, b"payload"))
    assert server.exists(started.keys.weights_chunk("1.full", 0)) == 0
    (path,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert path.read_bytes() == b"payload"


@pytest.mark.parametrize(("damage", "message"), [("flip", "damaged"), ("cut", "damaged"), ("lose", "gone")])
def test_damage_on_a_disk_is_named(started: RedisRun, tmp_path: Path, damage: str, message: str) -> None:
    publish(started.weights_for(WeightsConfig(store=f"file://{tmp_path}")), full(1, b"payload"))
    (path,) = (path for path in tmp_path.rglob("*") if path.is_file())
    match damage:
        case "flip":
            path.write_bytes(b"pAyload")
        case "cut":
            path.write_bytes(b"payloa")
        case "lose":
            path.unlink()
    with pytest.raises(WeightsError, match=rf"1\.full is {message}"):
        started.weights.fetch(full(1, b"payload").available)


def test_a_folder_that_cannot_be_written_to_is_named(started: RedisRun, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"check weights\.store"):
        publish(started.weights_for(WeightsConfig(store=f"file://{tmp_path}/file")), full(1))
    assert started.weights.head() is None


def test_a_filesystem_that_nobody_knows_is_a_config_error(started: RedisRun) -> None:
    with pytest.raises(ConfigError, match=r"weights\.store: this machine cannot open nonsense://"):
        started.weights_for(WeightsConfig(store="nonsense://x"))


class AbsentDriver(importlib.abc.MetaPathFinder):
    """Makes one package look as if it was not installed, on this machine or elsewhere."""

    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        if name.partition(".")[0] == self._package:
            raise ImportError(f"No module named {name!r}")


@pytest.fixture
def without_s3fs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.meta_path", [AbsentDriver("s3fs"), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "s3fs", raising=False)


@pytest.mark.usefixtures("without_s3fs")
def test_a_driver_that_is_not_installed_is_named(started: RedisRun) -> None:
    expected = r"cannot open s3://: Install s3fs .* and at every actor"
    with pytest.raises(ConfigError, match=expected):
        started.weights_for(WeightsConfig(store="s3://bucket/weights"))
    file = full(1, b"payload")
    manifest = Manifest.elsewhere(file, "s3://bucket/weights/1.full")
    with pytest.raises(ConfigError, match=expected):  # at an actor, which learns of the URL from the manifest
        read_file(manifest, lambda: None)
