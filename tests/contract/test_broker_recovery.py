"""Redis restarts, or goes back in time, in memory and for real: the learner's word counts."""

import pytest
import redis

from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.errors import FencedError, LostDataError
from tests.contract.broker_world import FOREVER_S, LIMITS, OK, WAIT, durable, heldout, journal, offer, start, train
from tests.fakes_broker import FakeRun
from tests.redis_fixtures import BrokerRun, OpenRun


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


def test_held_out_leases_in_line_are_asked_again(broker_run: BrokerRun) -> None:
    source = start(broker_run)
    source.request_evaluation(heldout(0, 1))
    (held,) = broker_run.admission("a").lease(1)
    source.initialise(durable())
    assert broker_run.admission("a").renew([held]) == ()
    source.request_evaluation(heldout(0, 1))
    assert broker_run.admission("b").lease(1) == heldout(1)
