"""Weight files in Redis: lost replies, damage, readers, and a learner that dies while it publishes."""

import contextlib
import tempfile
from pathlib import Path

import pytest
import redis

from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.config.weights import WeightsConfig
from lambdapo_async.errors import WeightsError, WeightsGoneError, WeightsLostError
from lambdapo_async.weights.manifest import CHUNK_BYTES, NewFile
from tests.lossy_proxy import LossyProxy, lossy_proxy
from tests.redis_fixtures import TIMEOUT_S
from tests.weight_files import full, names, publish


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
    with pytest.raises(WeightsError, match=r"chunk 1 of 1\.full is") as caught:
        started.weights.fetch(file.available)
    assert isinstance(caught.value, WeightsLostError) == (damage == "lose")


def test_a_lost_manifest_is_named(started: RedisRun, server: redis.Redis) -> None:
    publish(started.weights, full(1))
    server.hdel(started.keys.weights_begun, "1.full")
    with pytest.raises(WeightsLostError, match=r"1\.full has no manifest"):
        started.weights.fetch(full(1).available)


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
    with pytest.raises(WeightsGoneError, match=r"1\.full is gone"):
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
