"""A real Redis is killed, loses power, goes back, comes back empty, fails over, freezes, fills up."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis

from lambdapo_async.broker.interface import RolloutSource
from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.errors import BrokerUnavailable, LostDataError
from lambdapo_async.rollout import Lease
from lambdapo_async.weights.catch_up import plan_catch_up
from tests.contract.broker_world import (
    DUP,
    EPOCH,
    FOREVER_S,
    GAP,
    LIMITS,
    OK,
    WAIT,
    durable,
    journal,
    offer,
    start,
    train,
)
from tests.lossy_proxy import lossy_proxy
from tests.redis_fixtures import TIMEOUT_S, BrokerRun
from tests.redis_server import AOF, RDB, RedisServer, own_server
from tests.weight_files import full, step


@pytest.fixture
def own(tmp_path: Path) -> Iterator[RedisServer]:
    with own_server(tmp_path, AOF) as server:
        yield server


@pytest.fixture
def own_run(own: RedisServer) -> Iterator[RedisRun]:
    with contextlib.closing(RedisRun(own.url, "test", timeout_s=TIMEOUT_S)) as run:
        yield run


def three_offered_one_committed(run: BrokerRun, source: RolloutSource) -> tuple[Lease, ...]:
    """The four leases of actor ``a``; the last is not answered."""
    leases = run.admission("a").lease(4)
    for seq in (1, 2, 3):
        offer(run, seq, leases[seq - 1])
    journal(source, count=1)
    source.commit({"a.0": 1})
    return leases


def test_after_a_kill_with_its_log_intact_everything_goes_on(own: RedisServer, own_run: RedisRun) -> None:
    source = start(own_run)
    three_offered_one_committed(own_run, source)
    own.restart()
    with pytest.raises(LostDataError, match="its server restarted"):
        source.read(1, timeout_s=0.001)
    source.initialise(durable({"a.0": 1}, waiting=1, next_index=1))
    assert journal(source, count=2) == [("a.0", 2), ("a.0", 3)]
    assert (source.stats().leased, source.stats().admitted) == (1, 4)


def test_after_a_power_cut_no_group_is_trained_twice_and_none_is_lost(own: RedisServer, own_run: RedisRun) -> None:
    source = start(own_run)
    admission = own_run.admission("a")
    leases = admission.lease(4)
    offer(own_run, 1, leases[0])
    with own.rolled_back():
        offer(own_run, 2, leases[1])
        offer(own_run, 3, leases[2])
        assert journal(source, count=2) == [("a.0", 1), ("a.0", 2)]
        source.commit({"a.0": 2})
    # The first group is back in the queue, the second and third are gone, the commit never was.
    with pytest.raises(LostDataError):
        source.commit({"a.0": 2})
    source.initialise(durable({"a.0": 2}, waiting=2, next_index=2))
    marks = own_run.sink().marks("a.0")
    assert (marks.last, marks.committed) == (2, 2)
    assert offer(own_run, 4, leases[3]).status is GAP
    assert [offer(own_run, seq, leases[seq - 1]).status for seq in (1, 2, 3, 4)] == [DUP, DUP, OK, OK]
    assert journal(source, count=2) == [("a.0", 3), ("a.0", 4)]
    assert source.stats().admitted == 4
    assert own_run.admission("b").lease(9) == ()


def test_a_commit_on_a_connection_that_was_opened_anew_deletes_nothing(own: RedisServer, own_run: RedisRun) -> None:
    source = start(own_run)
    with own.rolled_back():
        offer(own_run, 1, *train(0))
        journal(source, count=1)
    # Under the same number, another group than the one that the learner has read.
    epoch = own_run.run_store.state().epoch
    assert offer(own_run, 1, *train(3), payload=b"other", epoch=epoch).status is WAIT
    with pytest.raises(LostDataError):
        source.commit({"a.0": 1})
    assert own_run.sink().marks("a.0").committed == 0


def test_a_queue_full_of_committed_groups_after_a_power_cut_empties(own: RedisServer, own_run: RedisRun) -> None:
    source = start(own_run, dataclasses.replace(LIMITS, max_groups=2))
    for seq in (1, 2):
        offer(own_run, seq, *train(seq - 1))
    with own.rolled_back():
        journal(source, count=2)
        source.commit({"a.0": 2})
    source.initialise(durable({"a.0": 2}, waiting=2, next_index=2))
    assert (source.stats().queued, source.stats().num_bytes) == (0, 0)
    assert [offer(own_run, seq, *train(seq - 1)).status for seq in (2, 3, 4)] == [DUP, OK, OK]


def test_leases_of_received_prompts_that_came_back_are_never_granted(own: RedisServer, own_run: RedisRun) -> None:
    source = start(own_run)
    leases = own_run.admission("a").lease(2)
    with own.rolled_back():
        for seq in (1, 2):
            offer(own_run, seq, leases[seq - 1])
        journal(source, count=2)
        source.commit({"a.0": 2})
        source.release(2)
        assert own_run.admission("b").lease(1) == train(2)
    assert own_run.admission("b").lease(9) == ()
    source.initialise(durable({"a.0": 2}, consumed=2, next_index=2))
    assert source.stats().leased == 0
    assert own_run.admission("b").lease(9) == train(2, 3, 4, 5)


def test_an_older_snapshot_is_no_different(tmp_path: Path) -> None:
    with (
        own_server(tmp_path, RDB) as own,
        contextlib.closing(RedisRun(own.url, "test", timeout_s=TIMEOUT_S)) as run,
    ):
        source = start(run)
        leases = run.admission("a").lease(2)
        own.client.save()
        for seq in (1, 2):
            offer(run, seq, leases[seq - 1])
        journal(source, count=1)
        source.commit({"a.0": 1})
        own.restart()
        with pytest.raises(LostDataError):
            source.read(1, timeout_s=0.001)
        source.initialise(durable({"a.0": 1}, waiting=1, next_index=1))
        assert [offer(run, seq, leases[seq - 1]).status for seq in (1, 2)] == [DUP, OK]
        assert journal(source, count=1) == [("a.0", 2)]
        assert (source.stats().leased, source.stats().admitted) == (0, 2)


def test_weights_of_an_older_snapshot_are_followed_by_newer_numbers(tmp_path: Path) -> None:
    """A follower of version 3 is not woken by a head that went back to 1, and is by the learner's next."""
    with (
        own_server(tmp_path, RDB) as own,
        contextlib.closing(RedisRun(own.url, "test", timeout_s=TIMEOUT_S)) as run,
    ):
        source = start(run)
        run.weights.publish(0, [full(0)], consumed=0, fence=1)
        run.weights.publish(1, [step(1)], consumed=0, fence=1)
        own.client.save()
        for version in (2, 3):
            run.weights.publish(version, [step(version)], consumed=0, fence=1)
        own.restart()
        assert (run.weights.head(), run.weights.wait_newer(3, timeout_s=0.01)) == (1, None)
        with pytest.raises(LostDataError):
            run.weights.publish(4, [step(4)], consumed=0, fence=1)
        source.initialise(durable())
        with ThreadPoolExecutor(1) as follower:
            adopted = follower.submit(run.weights.wait_newer, 3, timeout_s=FOREVER_S)
            run.weights.publish(4, [full(4, b"new")], consumed=0, fence=1)
            assert adopted.result(FOREVER_S) == 4
        (newest,) = plan_catch_up(run.weights.files(), at=3, head=4).files
        assert run.weights.fetch(newest) == b"new"


def test_an_empty_server_gets_a_new_epoch_and_every_outbox_offers_again(own: RedisServer, own_run: RedisRun) -> None:
    source = start(own_run)
    old_epoch = own_run.run_store.state().epoch
    leases = three_offered_one_committed(own_run, source)
    own.restart_empty()
    with pytest.raises(LostDataError, match="does not hold the run"):
        source.read(1, timeout_s=0.001)
    assert offer(own_run, 4, leases[3], epoch=old_epoch).status is WAIT
    own_run.run_store.create(b"{}", {}, fence=1)
    source.initialise(durable({"a.0": 1}, waiting=1, next_index=1))
    own_run.run_store.set_phase("running", fence=1)
    refused = offer(own_run, 4, leases[3], epoch=old_epoch)
    assert (refused.status, refused.committed) == (EPOCH, 1)
    assert refused.epoch not in ("", old_epoch)
    assert [offer(own_run, seq, leases[seq - 1]).status for seq in (2, 3, 4)] == [OK, OK, OK]
    assert journal(source, count=3) == [("a.0", 2), ("a.0", 3), ("a.0", 4)]
    # What an actor answered before Redis forgot the lease is not asked again.
    source.release(4)
    assert own_run.admission("b").lease(1) == train(4)
    assert source.stats().admitted == 1


def test_a_promoted_replica_that_missed_the_end(tmp_path: Path) -> None:
    with (
        own_server(tmp_path / "one") as one,
        own_server(tmp_path / "two") as two,
        tempfile.TemporaryDirectory() as folder,
        lossy_proxy(Path(folder), one.url) as address,
        contextlib.closing(RedisRun(address.url, "test", timeout_s=TIMEOUT_S)) as run,
    ):
        source = start(run)
        offer(run, 1, *train(0))
        copy_all(one.client, two.client)
        offer(run, 2, *train(1))
        journal(source, count=2)
        source.commit({"a.0": 2})
        one.kill()
        address.forward_to(two.url)
        with pytest.raises(LostDataError, match="its server restarted"):
            source.read(1, timeout_s=0.001)
        source.initialise(durable({"a.0": 2}, waiting=2, next_index=2))
        assert [offer(run, seq, *train(seq - 1)).status for seq in (1, 2, 3)] == [DUP, DUP, OK]
        assert journal(source, count=1) == [("a.0", 3)]


def test_a_replica_is_waited_for_until_it_takes_writes(own: RedisServer, own_run: RedisRun) -> None:
    start(own_run)
    own.client.replicaof("127.0.0.1", "1")
    own_run._broker.wait_at_most(0.2)
    with pytest.raises(BrokerUnavailable, match="it is a replica"):
        offer(own_run, 1, *train(0))
    own.client.replicaof("NO", "ONE")
    assert offer(own_run, 1, *train(0)).status is OK


def test_a_frozen_server_is_waited_for(own: RedisServer, tmp_path: Path) -> None:
    with contextlib.closing(RedisRun(own.url, "test", timeout_s=3.0)) as run:
        source = start(run)
        own.freeze()
        with pytest.raises(BrokerUnavailable, match="did not answer"):
            source.read(1, timeout_s=0.001)
        own.thaw()
        offer(run, 1, *train(0))
        assert journal(source, count=1) == [("a.0", 1)]


def test_a_full_server_is_emptied_by_its_learner(own: RedisServer, own_run: RedisRun) -> None:
    source = start(own_run, dataclasses.replace(LIMITS, max_bytes=10**9))
    own_run.run_store.set_phase("running", fence=1)
    payload, used = bytes(2**20), own.client.info("memory")["used_memory"]
    for seq in range(1, 9):
        offer(own_run, seq, *train(seq), payload=payload)
    own.client.config_set("maxmemory", used + 5 * 2**20)
    own_run._broker.wait_at_most(0.2)
    with pytest.raises(BrokerUnavailable, match=r"out of memory \(raise its maxmemory"):
        offer(own_run, 9, *train(9), payload=payload)
    journal(source, count=8)
    source.commit({"a.0": 8})
    assert offer(own_run, 9, *train(9), payload=payload).status is OK
    assert own_run.sink().marks("a.0").committed == 8


def copy_all(source: redis.Redis, target: redis.Redis) -> None:
    """What a replica has received so far."""
    for name in source.scan_iter():
        target.restore(name, max(source.pttl(name), 0), source.dump(name))
