"""Redis restarts, goes back in time, comes back empty, loses a part, fills up: the learner's word counts."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis

from lambdapo_async.broker.connection import connect
from lambdapo_async.broker.interface import EnqueueStatus, RolloutSource
from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.errors import BrokerUnavailable, FencedError, LostDataError
from lambdapo_async.rollout import Lease
from lambdapo_async.weights.catch_up import plan_catch_up
from tests.contract.broker_world import FOREVER_S, LIMITS, durable, heldout, offer, start, train
from tests.fakes_broker import FakeRun
from tests.lossy_proxy import lossy_proxy
from tests.redis_fixtures import TIMEOUT_S, BrokerRun, OpenRun
from tests.redis_server import AOF, RDB, RedisServer, own_server
from tests.weight_files import full, step

OK, DUP, GAP, FULL, EPOCH, WAIT, LATE = EnqueueStatus


@pytest.fixture
def own(tmp_path: Path) -> Iterator[RedisServer]:
    with own_server(tmp_path, AOF) as server:
        yield server


@pytest.fixture
def own_run(own: RedisServer) -> Iterator[RedisRun]:
    with contextlib.closing(RedisRun(own.url, "test", timeout_s=TIMEOUT_S)) as run:
        yield run


@pytest.fixture
def server(redis_url: str) -> Iterator[redis.Redis]:
    """Redis itself, behind the broker's back."""
    with contextlib.closing(connect(redis_url, timeout_s=TIMEOUT_S)) as client:
        yield client


def restart(run: BrokerRun) -> None:
    """The server comes back with all its data."""
    if isinstance(run, FakeRun):
        run.shared.restart()
    else:
        run._broker.call(lambda client: client.hset(run.keys.state, "server", "another"))


def go_back(run: BrokerRun) -> None:
    """The same server with slightly older data."""
    if isinstance(run, FakeRun):
        run.shared.ticks -= 1
    else:
        run._broker.call(lambda client: client.hincrby(run.keys.state, "ticks", -1))


def journal(source: RolloutSource, *, count: int) -> list[tuple[str, int]]:
    """Read ``count`` groups, as a learner does before it writes them down."""
    read: list[tuple[str, int]] = []
    while len(read) < count:
        deliveries = source.read(count - len(read), timeout_s=FOREVER_S)
        assert deliveries
        read += [(one.descriptor.producer, one.descriptor.seq) for one in deliveries]
    return read


def three_offered_one_committed(run: BrokerRun, source: RolloutSource) -> tuple[Lease, ...]:
    """The four leases of actor ``a``; the last is not answered."""
    leases = run.admission("a").lease(4)
    for seq in (1, 2, 3):
        offer(run, seq, leases[seq - 1])
    journal(source, count=1)
    source.commit({"a.0": 1})
    return leases


def test_a_restarted_server_is_closed_until_its_learner_comes_back(broker_run: BrokerRun) -> None:
    source = start(broker_run)
    admission = broker_run.admission("a")
    leases = admission.lease(3)
    offer(broker_run, 1, leases[0])
    restart(broker_run)
    assert not broker_run.sink().marks("a.0").is_open
    assert offer(broker_run, 2, leases[1]).status is WAIT
    assert admission.lease(9) == ()
    assert admission.renew(leases) == ()
    with pytest.raises(LostDataError):
        source.read(9, timeout_s=0.001)
    with pytest.raises(LostDataError):
        source.commit({"a.0": 1})
    source.initialise(durable())
    assert journal(source, count=1) == [("a.0", 1)]
    assert broker_run.sink().marks("a.0").is_open
    assert offer(broker_run, 2, leases[1]).status is OK
    assert admission.lease(9) == train(3)
    assert source.stats().admitted == 4


def test_what_is_read_while_the_queue_is_made_anew_is_not_believed(
    redis_run: RedisRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The entry was read before Redis lost it, its payload after another group had taken the number."""
    source = start(redis_run)
    offer(redis_run, 1, *train(0), payload=b"old")
    read_stream = source._read_stream

    def read_and_lose(count: int, *, block_ms: int) -> object:
        entries = read_stream(count, block_ms=block_ms)
        monkeypatch.undo()
        restart(redis_run)
        redis_run._broker.call(lambda client: client.delete(redis_run.keys.queue, redis_run.keys.payload("a.0", 1)))
        source.initialise(durable())
        offer(redis_run, 1, *train(1), payload=b"new")
        return entries

    monkeypatch.setattr(source, "_read_stream", read_and_lose)
    assert source.read(1, timeout_s=FOREVER_S) == []
    (delivery,) = source.read(1, timeout_s=FOREVER_S)
    assert (delivery.descriptor.lease, delivery.payload) == (*train(1), b"new")


def test_older_data_on_the_same_server_are_noticed(broker_run: BrokerRun) -> None:
    source = start(broker_run)
    for seq in (1, 2):
        offer(broker_run, seq, *train(seq))
    journal(source, count=1)
    source.commit({"a.0": 1})
    go_back(broker_run)
    with pytest.raises(LostDataError):
        source.commit({"a.0": 2})
    with pytest.raises(LostDataError):
        source.read(1, timeout_s=0.001)
    assert source.stats().queued == 1
    source.initialise(durable({"a.0": 1}, waiting=1, next_index=2, holes=(0,)))
    assert journal(source, count=1) == [("a.0", 2)]


def test_an_old_learner_cannot_initialise_again(open_run: OpenRun[BrokerRun]) -> None:
    old = start(open_run())
    new = open_run().source(2, LIMITS)
    new.initialise(durable())
    with pytest.raises(FencedError):
        old.initialise(durable())


def test_marks_tell_an_idle_actor_what_is_durable(broker_run: BrokerRun) -> None:
    source = start(broker_run)
    for seq in (1, 2):
        offer(broker_run, seq, *train(seq))
    journal(source, count=2)
    source.commit({"a.0": 1})
    marks = broker_run.sink().marks("a.0")
    assert (marks.is_open, marks.last, marks.committed) == (True, 2, 1)
    assert marks.epoch == broker_run.run_store.state().epoch


def test_a_learner_that_lives_is_heard(redis_run: RedisRun, server: redis.Redis) -> None:
    source = start(redis_run)
    server.hincrby(redis_run.keys.state, "seen", -100_000)
    assert redis_run.run_store.state().learner_silent_s > 99
    source.read(1, timeout_s=0.001)
    assert redis_run.run_store.state().learner_silent_s < 99


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
    with contextlib.closing(RedisRun(own.url, "test", timeout_s=0.6)) as run:
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


def test_held_out_leases_in_line_are_asked_again(broker_run: BrokerRun) -> None:
    source = start(broker_run)
    source.request_evaluation(heldout(0, 1))
    (held,) = broker_run.admission("a").lease(1)
    source.initialise(durable())
    assert broker_run.admission("a").renew([held]) == ()
    source.request_evaluation(heldout(0, 1))
    assert broker_run.admission("b").lease(1) == heldout(1)


def copy_all(source: redis.Redis, target: redis.Redis) -> None:
    """What a replica has received so far."""
    for name in source.scan_iter():
        target.restore(name, max(source.pttl(name), 0), source.dump(name))
