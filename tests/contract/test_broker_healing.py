"""A Redis that lost or damaged a part of the run: the learner notices, and its word heals it."""

from collections.abc import Callable

import pytest
import redis

from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.errors import LostDataError
from tests.contract.broker_world import FOREVER_S, OK, durable, journal, offer, start, train

EVICTIONS: dict[str, tuple[Callable[[RedisRun], bytes], str]] = {
    "payload": (lambda run: run.keys.payload("a.0", 2), "payload of group 2"),
    "queue": (lambda run: run.keys.queue, "entries of the queue"),
    "accepted": (lambda run: run.keys.accepted, "sequence numbers"),
    "committed": (lambda run: run.keys.committed, "sequence numbers"),
    "leases": (lambda run: run.keys.leases, "leases"),
    "holders": (lambda run: run.keys.holders, "leases"),
    "state": (lambda run: run.keys.state, "does not hold the run"),
}


@pytest.mark.parametrize("victim", EVICTIONS)
def test_an_evicted_key_is_noticed_and_healed(redis_run: RedisRun, server: redis.Redis, victim: str) -> None:
    source = start(redis_run)
    leases = redis_run.admission("a").lease(4)
    for seq in (1, 2, 3):
        offer(redis_run, seq, leases[seq - 1])
    journal(source, count=1)
    source.commit({"a.0": 1})
    name, message = EVICTIONS[victim]
    server.delete(name(redis_run))
    with pytest.raises(LostDataError, match=message):
        source.read(9, timeout_s=0.001)
    redis_run.run_store.create(b"{}", {}, fence=1)
    source.initialise(durable({"a.0": 1}, waiting=1, next_index=1))
    redis_run.run_store.set_phase("running", fence=1)
    # The actor goes on where the queue says.
    last = redis_run.sink().marks("a.0").last
    for seq in range(last + 1, 5):
        assert offer(redis_run, seq, leases[seq - 1]).status is OK
    assert journal(source, count=3) == [("a.0", 2), ("a.0", 3), ("a.0", 4)]
    source.commit({"a.0": 4})
    stats = source.stats()
    assert (stats.queued, stats.num_bytes, stats.leased) == (0, 0, 0)


def test_a_damaged_frontier_is_not_believed(redis_run: RedisRun, server: redis.Redis) -> None:
    source = start(redis_run)
    redis_run.admission("a").lease(2)
    server.hset(redis_run.keys.state, "frontier", 10**15)
    source.initialise(durable(next_index=1))
    assert source.stats().leased == 0
    assert redis_run.admission("a").lease(2) == train(1, 2)


def test_half_a_transaction_is_healed(redis_run: RedisRun, server: redis.Redis) -> None:
    source = start(redis_run)
    keys = redis_run.keys
    offer(redis_run, 1, *train(0), payload=bytes(10))
    # The end of an append-only file may hold any part of the last script.
    server.set(keys.payload("a.0", 2), b"no entry")
    server.set(keys.payload("b.0", 1), b"12345")
    fields = {"p": "b.0", "s": 1, "l": "train:0:1", "v": 0, "n": 5, "r": 0.0}
    server.xadd(keys.queue, fields)
    server.xadd(keys.queue, {**fields, "s": 2, "l": "train:0:2"})
    server.hincrby(keys.state, "bytes", 77)
    source.initialise(durable())
    assert (source.stats().queued, source.stats().num_bytes, source.stats().admitted) == (2, 15, 2)
    assert journal(source, count=2) == [("a.0", 1), ("b.0", 1)]
    assert redis_run.sink().marks("b.0").last == 1
    assert not server.exists(keys.payload("a.0", 2))


def test_a_malformed_entry_is_quarantined_and_its_number_is_used_up(redis_run: RedisRun, server: redis.Redis) -> None:
    source = start(redis_run)
    offer(redis_run, 1, *train(0))
    damage(redis_run, server, {"p": "a.0", "s": 2, "l": "no lease"})
    assert journal(source, count=1) == [("a.0", 1)]
    assert source.read(1, timeout_s=0.001) == []
    assert offer(redis_run, 3, *train(2)).status is OK
    assert journal(source, count=1) == [("a.0", 3)]
    source.commit({"a.0": 3})
    assert (source.stats().quarantined, source.stats().queued) == (1, 0)


def test_an_entry_that_names_no_group_is_lost_data(redis_run: RedisRun, server: redis.Redis) -> None:
    source = start(redis_run)
    offer(redis_run, 1, *train(0))
    damage(redis_run, server, {"x": "y"})
    with pytest.raises(LostDataError, match="names no group"):
        source.read(9, timeout_s=FOREVER_S)
    source.initialise(durable())
    assert journal(source, count=1) == [("a.0", 1)]
    assert (source.stats().quarantined, source.stats().queued) == (1, 1)


def damage(run: RedisRun, server: redis.Redis, fields: dict[str, object]) -> None:
    """An entry that is no descriptor, where a group of a.0 was."""
    server.xadd(run.keys.queue, fields)  # type: ignore[arg-type]
    server.hincrby(run.keys.state, "queued", 1)
    server.hincrby(run.keys.accepted, "a.0", 1)
