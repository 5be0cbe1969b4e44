"""Damaged and missing data in a real Redis are errors with a name, and what is kept there is bounded."""

from dataclasses import replace

import msgpack
import pytest
import redis

from lambdapo_async.broker.interface import Descriptor, EnqueueStatus
from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.errors import BrokerError, LostDataError, RunNotFoundError, TaskError
from lambdapo_async.rollout import Lease, Split
from lambdapo_async.weights.manifest import Manifest
from lambdapo_async.weights.redis_chunks import RedisChunks
from tests.contract.broker_world import FOREVER_S, SHORT, durable, eventually, heldout, offer, start, train
from tests.contract.test_broker_run import heartbeat
from tests.redis_fixtures import OpenRun
from tests.weight_files import full, step


def test_an_actor_refuses_another_schema(redis_run: RedisRun, server: redis.Redis) -> None:
    start(redis_run)
    server.hset(redis_run.keys.state, "schema", 7)
    with pytest.raises(RunNotFoundError, match="speaks schema 7, this version speaks 3"):
        redis_run.run_store.config_json()


@pytest.mark.parametrize("field", ["fence", "bytes", "admitted", "consumed", "late"])
def test_a_damaged_counter_is_named(redis_run: RedisRun, server: redis.Redis, field: str) -> None:
    source = start(redis_run)
    server.hset(redis_run.keys.state, field, b"12x")
    with pytest.raises(BrokerError, match=f"{field} of the run is damaged in Redis: b'12x' is no number"):
        source.stats()


@pytest.mark.parametrize("field", ["schema", "version", "seen"])
def test_a_damaged_state_is_named(redis_run: RedisRun, server: redis.Redis, field: str) -> None:
    start(redis_run)
    server.hset(redis_run.keys.state, field, b"x")
    with pytest.raises(BrokerError, match=f"{field} of the run is damaged"):
        redis_run.run_store.state()


def test_a_damaged_head_or_number_of_rows_is_named(redis_run: RedisRun, server: redis.Redis) -> None:
    start(redis_run)
    server.set(redis_run.keys.weights_head, b"new")
    server.hset(redis_run.keys.state, "rows_train", b"many")
    with pytest.raises(BrokerError, match="newest weight version of the run is damaged"):
        redis_run.weights.head()
    with pytest.raises(BrokerError, match="rows_train of the run is damaged"):
        redis_run.run_store.num_rows("train")


def test_too_many_rows_are_refused(redis_run: RedisRun) -> None:
    store = redis_run.run_store
    small = type(store)(store._broker, redis_run.keys, store._ownership, store._seal, max_split_bytes=100)
    with pytest.raises(TaskError, match=r"task\.max_rows"):
        small.put_rows("train", [{"prompt": str(index), "answer": ""} for index in range(600)])


def test_damaged_rows_are_named(redis_run: RedisRun, server: redis.Redis) -> None:
    start(redis_run)
    redis_run.run_store.put_rows("train", [{"prompt": "p", "answer": "a"}])
    server.hset(redis_run.keys.rows("train"), "0", b"garbage")
    with pytest.raises(BrokerError, match="chunk 0 of the train rows is damaged"):
        redis_run.run_store.row("train", 0)


def test_a_missing_chunk_is_an_error_until_it_is_there(redis_run: RedisRun, server: redis.Redis) -> None:
    start(redis_run)
    rows = [{"prompt": "p", "answer": "a"}]
    redis_run.run_store.put_rows("train", rows)
    chunk = server.hget(redis_run.keys.rows("train"), "0")
    server.delete(redis_run.keys.rows("train"))
    with pytest.raises(BrokerError, match="no rows from 0 on in train"):
        redis_run.run_store.row("train", 0)
    server.hset(redis_run.keys.rows("train"), "0", chunk)
    assert redis_run.run_store.row("train", 0) == rows[0]


def test_fewer_rows_leave_no_chunk_of_the_old_ones(redis_run: RedisRun, server: redis.Redis) -> None:
    start(redis_run)
    for count in (600, 300):
        redis_run.run_store.put_rows("train", [{"prompt": "p", "answer": "a"}] * count)
    assert sorted(server.hkeys(redis_run.keys.rows("train"))) == [b"0", b"1"]


@pytest.mark.parametrize(
    "record", [b"", b"garbage", msgpack.packb({"actor_id": "x"}), msgpack.packb([1]), bytes(20_000)]
)
def test_unreadable_heartbeats_are_left_out_and_counted(
    redis_run: RedisRun, server: redis.Redis, record: bytes
) -> None:
    start(redis_run)
    redis_run.fleet.beat(heartbeat("bad"))
    redis_run.fleet.beat(heartbeat("good"))
    server.hset(redis_run.keys.fleet, "bad", record)
    assert redis_run.fleet.members() == (heartbeat("good"),)
    assert redis_run.fleet.num_unreadable == 1


def test_a_lost_payload_is_an_error(redis_run: RedisRun, server: redis.Redis) -> None:
    source = start(redis_run)
    offer(redis_run, 1, *train(0))
    server.delete(redis_run.keys.payload("a.0", 1))
    with pytest.raises(BrokerError, match="payload of group 1"):
        source.read(1, timeout_s=FOREVER_S)


def test_a_lost_entry_is_an_error(redis_run: RedisRun, server: redis.Redis) -> None:
    source = start(redis_run)
    for seq in (1, 2):
        offer(redis_run, seq, *train(seq))
    server.xtrim(redis_run.keys.queue, maxlen=1, approximate=False)
    with pytest.raises(BrokerError, match="entries of the queue are gone"):
        source.read(1, timeout_s=FOREVER_S)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_an_evicted_line_of_leases_is_an_error_and_comes_back(
    redis_run: RedisRun, server: redis.Redis, split: Split
) -> None:
    source, line = start(redis_run), {"train": redis_run.keys.todo, "heldout": redis_run.keys.heldout}[split]
    asked = (Lease(split, 0), Lease(split, 1))
    if split == "heldout":
        source.request_evaluation(asked)
    admission = redis_run.admission("a")
    assert admission.lease(2) == asked
    admission.hand_back(asked)
    assert source.read(1, timeout_s=0.01) == []
    server.delete(line)
    with pytest.raises(LostDataError, match="leases in line are gone"):
        source.read(1, timeout_s=0.01)
    with pytest.raises(LostDataError, match="leases in line are gone"):
        source.commit({})
    source.initialise(durable())
    source.request_evaluation(asked)
    assert source.read(1, timeout_s=0.01) == []
    assert admission.lease(2) == asked


def test_whichever_way_leases_come_into_line_and_leave_it_nothing_looks_lost(
    redis_run: RedisRun, server: redis.Redis
) -> None:
    source, first = start(redis_run), redis_run.admission("a")

    def in_line() -> int:
        source.read(1, timeout_s=0.01)
        return int(server.hget(redis_run.keys.state, "in_line") or 0)

    assert first.lease(4) == train(0, 1, 2, 3)
    first.hand_back(train(1, 2))
    assert in_line() == 2
    assert offer(redis_run, 1, *train(2), producer="c.0").status is EnqueueStatus.OK  # answered while it was in line
    assert in_line() == 1
    redis_run.fleet_control(1).quarantine(["a"])
    source.request_evaluation(heldout(0))
    assert in_line() == 4
    assert redis_run.admission("b").lease(9) == (*heldout(0), *train(0, 3, 1))
    assert in_line() == 0


def test_expired_leases_do_not_look_lost(redis_run: RedisRun) -> None:
    source = start(redis_run, SHORT)
    redis_run.admission("a").lease(4)
    assert eventually(lambda: redis_run.admission("b").lease(1)) == train(0)
    assert (source.stats().returned, source.read(1, timeout_s=0.01)) == (3, [])


def test_the_quarantine_is_bounded(redis_run: RedisRun, server: redis.Redis) -> None:
    source = start(redis_run)
    offer(redis_run, 1, *train(0))
    (delivery,) = source.read(1, timeout_s=FOREVER_S)
    for seq in range(300):
        source.quarantine(replace(delivery.descriptor, seq=seq), b"x", "reason")
    assert (source.stats().quarantined, server.xlen(redis_run.keys.dead)) == (300, 256)


def test_of_a_quarantined_payload_the_beginning_is_kept(redis_run: RedisRun, server: redis.Redis) -> None:
    source = start(redis_run)
    descriptor = Descriptor("a.0", 1, *train(0), 0, 1, 0.0)
    source.quarantine(descriptor, bytes(3 * 1024**2), "reason")
    source.quarantine(descriptor, bytes(3 * 1024**2), "reason")
    ((_, entry),) = server.xrange(redis_run.keys.dead)
    assert (len(entry[b"payload"]), entry[b"n"]) == (16 * 1024, b"%d" % (3 * 1024**2))


def test_nothing_is_left_of_committed_groups(redis_run: RedisRun, server: redis.Redis) -> None:
    source = start(redis_run)
    for seq in range(1, 8):
        offer(redis_run, seq, *train(seq))
        source.read(1, timeout_s=FOREVER_S)
    source.commit({"a.0": 7})
    assert server.keys(redis_run.keys.payload("a.0", 1)[:-1] + b"*") == []
    assert (source.stats().queued, source.stats().num_bytes) == (0, 0)


def test_every_key_lies_in_the_runs_slot(open_redis_run: OpenRun[RedisRun], server: redis.Redis) -> None:
    run = open_redis_run()
    before = set(server.keys())
    source = start(run)
    run.run_store.put_rows("train", [{"prompt": "p", "answer": "a"}])
    source.request_evaluation(train(5))
    (lease,) = run.admission("a").lease(1)
    offer(run, 1, lease)
    source.commit({"a.0": 1})
    run.weights.publish(1, [full(1)], consumed=0, fence=1)
    run.fleet.beat(heartbeat("a"))
    tag = b"{lp:%s}:" % run.keys.run_id.encode()
    assert {name[: len(tag)] for name in set(server.keys()) - before} == {tag}


@pytest.mark.parametrize("lost", ["manifest", "piece"])
def test_a_version_that_was_lost_while_it_was_written_does_not_become_the_head(
    redis_run: RedisRun, server: redis.Redis, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """Its learner may have made a restarted server its own between the first script and the last one."""
    start(redis_run)
    keys, store = redis_run.keys, redis_run.weights
    store.publish(0, [full(0)], consumed=0, fence=1)
    put = RedisChunks.put

    def put_and_lose(chunks: RedisChunks, manifest: Manifest, payload: bytes, *, fence: int) -> None:
        put(chunks, manifest, payload, fence=fence)
        if lost == "piece":
            server.delete(keys.weights_chunk(manifest.name, 0))
        else:
            server.hdel(keys.weights_begun, manifest.name)

    monkeypatch.setattr(RedisChunks, "put", put_and_lose)
    with pytest.raises(LostDataError, match="is gone"):
        store.publish(1, [step(1)], consumed=0, fence=1)
    assert store.head() == 0
    assert [file.version for file in store.files()] == [0]
