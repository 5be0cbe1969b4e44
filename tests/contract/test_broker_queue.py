"""The rollout queue, in memory and in Redis."""

import dataclasses

import pytest

from lambdapo_async.broker.interface import EnqueueStatus
from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.errors import BrokerError, FencedError
from tests.contract.broker_world import FOREVER_S, LIMITS, SHORT, durable, eventually, heldout, offer, start, train
from tests.redis_fixtures import BrokerRun, OpenRun
from tests.weight_files import full


def test_a_group_arrives_as_it_was_sent(broker_run: BrokerRun) -> None:
    source = start(broker_run)
    broker_run.admission("a").lease(2)
    reply = offer(broker_run, 1, *train(0), payload=b"\x00\xffgroup")
    assert (reply.status, reply.last, reply.committed) == (EnqueueStatus.OK, 1, 0)
    (delivery,) = source.read(5, timeout_s=FOREVER_S)
    assert delivery.payload == b"\x00\xffgroup"
    descriptor = delivery.descriptor
    assert (descriptor.producer, descriptor.seq, descriptor.lease) == ("a.0", 1, *train(0))
    assert (descriptor.min_version, descriptor.num_bytes, descriptor.mean_reward) == (0, 7, 0.5)
    assert source.stats().leased == 1


def test_the_same_number_is_accepted_once(broker_run: BrokerRun) -> None:
    source = start(broker_run)
    broker_run.admission("a").lease(1)
    statuses = [offer(broker_run, 1, *train(0)).status for _ in range(3)]
    assert statuses == [EnqueueStatus.OK, EnqueueStatus.DUP, EnqueueStatus.DUP]
    assert source.stats().queued == 1


def test_a_skipped_number_is_a_gap(broker_run: BrokerRun) -> None:
    start(broker_run)
    offer(broker_run, 1, *train(0))
    reply = offer(broker_run, 3, *train(1))
    assert (reply.status, reply.last) == (EnqueueStatus.GAP, 1)


def test_another_epoch_is_refused_and_told(broker_run: BrokerRun) -> None:
    start(broker_run)
    reply = offer(broker_run, 1, *train(0), epoch="other")
    assert reply.status is EnqueueStatus.EPOCH
    assert reply.epoch == broker_run.run_store.state().epoch
    assert offer(broker_run, 1, *train(0), epoch=reply.epoch).status is EnqueueStatus.OK


def test_the_queue_is_full_in_groups(broker_run: BrokerRun) -> None:
    source = start(broker_run, dataclasses.replace(LIMITS, max_groups=2))
    for seq in (1, 2):
        offer(broker_run, seq, *train(seq))
    assert offer(broker_run, 3, *train(3)).status is EnqueueStatus.FULL
    source.read(5, timeout_s=FOREVER_S)
    assert offer(broker_run, 3, *train(3)).status is EnqueueStatus.FULL
    source.commit({"a.0": 1})
    assert offer(broker_run, 3, *train(3)).status is EnqueueStatus.OK


def test_the_queue_is_full_in_bytes(broker_run: BrokerRun) -> None:
    start(broker_run)
    assert offer(broker_run, 1, *train(0), payload=bytes(600)).status is EnqueueStatus.OK
    assert offer(broker_run, 2, *train(1), payload=bytes(401)).status is EnqueueStatus.FULL
    assert offer(broker_run, 2, *train(1), payload=bytes(400)).status is EnqueueStatus.OK


def test_a_group_that_can_never_fit_is_an_error(broker_run: BrokerRun) -> None:
    start(broker_run)
    with pytest.raises(BrokerError, match="1001 bytes"):
        offer(broker_run, 1, *train(0), payload=bytes(1001))


def test_late_when_another_actor_holds_the_lease(broker_run: BrokerRun) -> None:
    source = start(broker_run, SHORT)
    broker_run.admission("a").lease(4)
    assert eventually(lambda: broker_run.admission("b").lease(1)) == train(0)
    late = offer(broker_run, 1, *train(0))
    assert (late.status, late.last) == (EnqueueStatus.LATE, 0)
    assert offer(broker_run, 1, *train(0), producer="b.0").status is EnqueueStatus.OK
    assert source.stats().queued == 1
    # The number was not used up.
    assert offer(broker_run, 1, *train(77)).status is EnqueueStatus.OK


def test_late_when_another_actor_answered_already(broker_run: BrokerRun) -> None:
    source = start(broker_run)
    broker_run.admission("b").lease(1)
    offer(broker_run, 1, *train(0), producer="b.0")
    assert offer(broker_run, 1, *train(0)).status is EnqueueStatus.LATE
    source.read(5, timeout_s=FOREVER_S)
    source.commit({"b.0": 1})
    assert offer(broker_run, 1, *train(0)).status is EnqueueStatus.LATE


def test_an_answer_whose_lease_came_back_takes_it_out_of_line(broker_run: BrokerRun) -> None:
    source = start(broker_run)
    admission = broker_run.admission("a")
    admission.lease(2)
    admission.hand_back(train(0, 1))
    assert offer(broker_run, 1, *train(0)).status is EnqueueStatus.OK
    assert broker_run.admission("b").lease(1) == train(1)
    assert source.stats().admitted == 2


def test_an_answer_to_a_lease_that_redis_forgot_counts_for_the_gate(broker_run: BrokerRun) -> None:
    source = start(broker_run)
    assert offer(broker_run, 1, *train(40)).status is EnqueueStatus.OK
    assert offer(broker_run, 2, *heldout(3)).status is EnqueueStatus.OK
    assert source.stats().admitted == 1


def test_reading_goes_on_where_it_stopped(broker_run: BrokerRun) -> None:
    source = start(broker_run)
    for seq in (1, 2, 3):
        offer(broker_run, seq, *train(seq))
    offer(broker_run, 1, *train(9), producer="b.0")
    first = source.read(3, timeout_s=FOREVER_S)
    second = source.read(3, timeout_s=FOREVER_S)
    assert [(one.descriptor.producer, one.descriptor.seq) for one in first + second] == [
        ("a.0", 1),
        ("a.0", 2),
        ("a.0", 3),
        ("b.0", 1),
    ]
    assert source.read(3, timeout_s=0.01) == []


def test_what_is_read_stays_until_committed_and_commits_repeat(broker_run: BrokerRun) -> None:
    source = start(broker_run)
    for seq in (1, 2, 3):
        offer(broker_run, seq, *train(seq), payload=bytes(100))
    source.read(3, timeout_s=FOREVER_S)
    assert (source.stats().queued, source.stats().num_bytes) == (3, 300)
    for _ in range(2):
        source.commit({"a.0": 2})
        assert (source.stats().queued, source.stats().num_bytes) == (1, 100)
    source.commit({"a.0": 1})
    reply = offer(broker_run, 3, *train(3))
    assert (reply.status, reply.last, reply.committed) == (EnqueueStatus.DUP, 3, 2)


def test_the_next_learner_reads_again_what_no_checkpoint_holds(open_run: OpenRun[BrokerRun]) -> None:
    run = open_run()
    source = start(run)
    for seq in (1, 2, 3):
        offer(run, seq, *train(seq), payload=bytes([seq]))
    source.read(3, timeout_s=FOREVER_S)
    resumed = open_run().source(2, LIMITS)
    resumed.initialise(durable({"a.0": 1}, consumed=1, next_index=2))
    assert [one.payload for one in resumed.read(9, timeout_s=FOREVER_S)] == [b"\x02", b"\x03"]
    assert offer(run, 1, *train(1)).status is EnqueueStatus.DUP
    assert (resumed.stats().queued, resumed.stats().num_bytes) == (2, 2)


def test_a_mark_above_what_redis_knows_is_not_accepted_again(broker_run: BrokerRun) -> None:
    start(broker_run)
    source = broker_run.source(1, LIMITS)
    source.initialise(durable({"a.0": 5}, consumed=5, next_index=5))
    assert offer(broker_run, 5, *train(4)).status is EnqueueStatus.DUP
    assert offer(broker_run, 6, *train(5)).status is EnqueueStatus.OK
    assert [one.descriptor.seq for one in source.read(9, timeout_s=FOREVER_S)] == [6]


def test_an_old_learner_can_do_nothing_any_more(open_run: OpenRun[BrokerRun]) -> None:
    run = open_run()
    old = start(run)
    offer(run, 1, *train(0))
    (delivery,) = old.read(1, timeout_s=FOREVER_S)
    new = open_run().source(2, LIMITS)
    new.initialise(durable())
    for forbidden in (
        lambda: old.read(1, timeout_s=0.01),
        lambda: old.commit({"a.0": 1}),
        lambda: old.release(1),
        lambda: old.quarantine(delivery.descriptor, b"", "reason"),
        lambda: old.request_evaluation(heldout(0)),
        lambda: old.stats(),
        lambda: old.initialise(durable()),
        lambda: run.weights.publish(1, [full(1)], consumed=1, fence=1),
        lambda: run.run_store.set_phase("finished", fence=1),
        lambda: run.run_store.create(b"{}", {}, fence=1),
    ):
        with pytest.raises(FencedError):
            forbidden()
    assert (new.stats().queued, new.stats().admitted, new.stats().quarantined) == (1, 1, 0)
    assert run.weights.head() is None


def test_the_same_fence_of_another_learner_is_refused(open_run: OpenRun[BrokerRun]) -> None:
    start(open_run(), fence=3)
    stranger = open_run()
    with pytest.raises(FencedError):
        stranger.run_store.create(b"{}", {}, fence=3)
    with pytest.raises(FencedError):
        stranger.source(3, LIMITS).initialise(durable())


def test_a_learner_of_a_run_that_redis_lost_is_told(broker_run: BrokerRun) -> None:
    with pytest.raises(BrokerError, match="does not hold the run"):
        broker_run.source(1, LIMITS).release(1)


def test_unreadable_groups_are_counted(broker_run: BrokerRun) -> None:
    source = start(broker_run)
    for seq in (1, 2):
        offer(broker_run, seq, *train(seq))
    for delivery in source.read(2, timeout_s=FOREVER_S):
        source.quarantine(delivery.descriptor, delivery.payload, "garbage")
    assert source.stats().quarantined == 2


def test_what_was_refused_and_what_expired_is_counted(broker_run: BrokerRun) -> None:
    source = start(broker_run, dataclasses.replace(SHORT, max_groups=1))
    broker_run.admission("a").lease(1)
    assert eventually(lambda: broker_run.admission("b").lease(1)) == train(0)
    assert offer(broker_run, 1, *train(0), producer="a.0").status is EnqueueStatus.LATE
    assert offer(broker_run, 1, *train(0), producer="b.0").status is EnqueueStatus.OK
    assert offer(broker_run, 1, *train(5), producer="a.0").status is EnqueueStatus.FULL
    assert offer(broker_run, 1, *train(5), producer="a.0").status is EnqueueStatus.FULL
    assert (source.stats().expired, source.stats().late, source.stats().full) == (1, 1, 2)


def test_groups_of_one_moment_are_read_together(redis_run: RedisRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read costs the learner what several small groups do: after a short one, the next lets them gather."""
    source = start(redis_run)
    offer(redis_run, 1, *train(1))

    def pause(seconds: float) -> None:
        for seq in (2, 3) if seconds > 0 else ():
            offer(redis_run, seq, *train(seq))

    monkeypatch.setattr("lambdapo_async.broker.rollout_source._GATHERED_S", FOREVER_S)
    monkeypatch.setattr("lambdapo_async.broker.rollout_source.time.sleep", pause)
    assert [len(source.read(5, timeout_s=FOREVER_S)) for _ in range(2)] == [1, 2]


def test_groups_that_wait_are_read_without_a_pause(redis_run: RedisRun, monkeypatch: pytest.MonkeyPatch) -> None:
    source = start(redis_run)
    for seq in (1, 2, 3):
        offer(redis_run, seq, *train(seq))
    pauses: list[float] = []
    monkeypatch.setattr("lambdapo_async.broker.rollout_source._GATHERED_S", FOREVER_S)
    monkeypatch.setattr("lambdapo_async.broker.rollout_source.time.sleep", pauses.append)
    assert [len(source.read(1, timeout_s=FOREVER_S)) for _ in range(3)] == [1, 1, 1]
    assert max(pauses) == 0
