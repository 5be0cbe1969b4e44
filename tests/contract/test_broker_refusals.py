"""What a server may do beside losing data: be demoted, refuse writes, and evict two keys that vouch for each other."""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.errors import BrokerUnavailable, LostDataError
from tests.contract.broker_world import LIMITS, OK, durable, journal, offer, start, until
from tests.redis_server import AOF, RedisServer, own_server


@pytest.fixture
def own(tmp_path) -> Iterator[RedisServer]:
    with own_server(tmp_path, AOF) as server:
        yield server


@pytest.fixture
def own_run(own: RedisServer) -> RedisRun:
    return RedisRun(own.url, "test", timeout_s=30.0)


def test_a_blocked_reader_survives_its_servers_demotion(own: RedisServer, own_run: RedisRun) -> None:
    source, found = start(own_run), []

    def read() -> None:
        try:
            found.append(source.read(1, timeout_s=5.0))
        except Exception as error:  # noqa: BLE001
            found.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    until(lambda: bool(own.client.info("clients")["blocked_clients"]))
    own.client.replicaof("127.0.0.1", "1")
    own.client.replicaof("NO", "ONE")
    reader.join(30)
    assert found == [[]]


def test_a_reader_notices_that_its_server_was_demoted(own: RedisServer, own_run: RedisRun) -> None:
    source = start(own_run)
    own.client.replicaof("127.0.0.1", "1")
    own_run._broker.wait_at_most(0.2)
    with pytest.raises(BrokerUnavailable, match="replica"):
        source.read(1, timeout_s=0.01)


@pytest.mark.parametrize("trouble", ["MISCONF", "NOREPLICAS"])
def test_a_server_that_refuses_writes_for_a_while_is_waited_for(
    own: RedisServer, own_run: RedisRun, trouble: str
) -> None:
    source = start(own_run)
    leases = own_run.admission("a").lease(1)
    if trouble == "NOREPLICAS":
        own.client.config_set("min-replicas-to-write", 1)
    else:
        snapshot = Path(own.client.config_get("dir")["dir"], own.client.config_get("dbfilename")["dbfilename"])
        snapshot.mkdir()  # no file can take its name
        own.client.config_set("save", "3600 1")
        own.client.bgsave()
        until(lambda: own.client.info("persistence")["rdb_last_bgsave_status"] != "ok")
    own_run._broker.wait_at_most(0.2)
    with pytest.raises(BrokerUnavailable):
        own_run.admission("a").renew(leases)
    with pytest.raises(BrokerUnavailable):
        source.commit({})


def test_leases_and_holders_lost_together_are_noticed(redis_run: RedisRun, server: redis.Redis) -> None:
    source = start(redis_run)
    redis_run.admission("a").lease(4)
    server.delete(redis_run.keys.leases, redis_run.keys.holders)
    with pytest.raises(LostDataError):
        source.read(1, timeout_s=0.01)


def test_a_payload_lost_before_its_commit_leaves_no_bytes(redis_run: RedisRun, server: redis.Redis) -> None:
    source = start(redis_run)
    (lease,) = redis_run.admission("a").lease(1)
    offer(redis_run, 1, lease)
    journal(source, count=1)
    server.delete(redis_run.keys.payload("a.0", 1))
    source.commit({"a.0": 1})
    assert source.stats().num_bytes == 0


def test_numbers_lost_before_the_first_commit_put_no_payload_under_another_groups_entry(
    redis_run: RedisRun, server: redis.Redis
) -> None:
    source = start(redis_run)
    first, second = redis_run.admission("a").lease(2)
    assert offer(redis_run, 1, first, payload=b"AAAA").status is OK
    server.delete(redis_run.keys.accepted)
    offer(redis_run, 2, second, payload=b"BBBB")  # GAP: the outbox goes back to 1, ...
    offer(redis_run, 1, first, payload=b"AAAA")  # ... hears LATE, and the second group becomes the first
    offer(redis_run, 1, second, payload=b"BBBB")
    with contextlib.suppress(LostDataError):  # as good
        assert source.read(1, timeout_s=0.5)[0].payload == b"AAAA"


def test_a_queue_made_anew_between_two_batches_of_a_commit(redis_run: RedisRun, monkeypatch) -> None:
    source = start(redis_run, dataclasses.replace(LIMITS, groups_per_step=600, max_groups=4096, max_bytes=10**6))
    epoch = redis_run.run_store.state().epoch
    for seq, lease in enumerate(redis_run.admission("a").lease(600), start=1):
        assert offer(redis_run, seq, lease, epoch=epoch).status is OK
    journal(source, count=600)
    commit, calls = source._commit, []

    def and_heal(*args):
        calls.append(reply := commit(*args))
        if len(calls) == 1:  # the learner's loop, while the ingest thread commits
            source.initialise(durable({"a.0": 600}, waiting=600, next_index=600))
        return reply

    monkeypatch.setattr(source, "_commit", and_heal)
    source.commit({"a.0": 600})
    assert len(calls) == 2
