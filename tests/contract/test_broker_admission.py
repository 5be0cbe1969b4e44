"""Leases and the gate, in memory and in Redis."""

import dataclasses

import pytest

from lambdapo_async.broker.interface import EnqueueStatus
from lambdapo_async.rollout import Lease
from tests.contract.broker_world import LIMITS, SHORT, durable, eventually, heldout, offer, start, train
from tests.redis_fixtures import BrokerRun, OpenRun
from tests.weight_files import full


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_the_gate_is_open_for_staleness_plus_one_steps(broker_run: BrokerRun, max_staleness: int) -> None:
    source = start(broker_run, dataclasses.replace(LIMITS, max_staleness=max_staleness))
    capacity = (max_staleness + 1) * LIMITS.groups_per_step
    admission = broker_run.admission("a")
    assert admission.lease(100) == train(*range(capacity))
    assert admission.lease(1) == ()
    source.release(1)
    assert admission.lease(100) == train(capacity)
    assert source.stats().admitted == capacity


def test_groups_in_the_queue_keep_the_gate_closed_until_consumed(broker_run: BrokerRun) -> None:
    source = start(broker_run)
    admission = broker_run.admission("a")
    for seq, lease in enumerate(admission.lease(4), start=1):
        assert offer(broker_run, seq, lease).status is EnqueueStatus.OK
    assert admission.lease(1) == ()
    broker_run.weights.publish(1, [full(1)], consumed=2, fence=1)
    assert admission.lease(9) == train(4, 5)
    source.release(1)
    assert admission.lease(9) == ()


def test_nothing_is_leased_unless_the_run_is_running(broker_run: BrokerRun) -> None:
    assert broker_run.admission("a").lease(1) == ()
    start(broker_run)
    broker_run.run_store.set_phase("finished", fence=1)
    assert broker_run.admission("a").lease(1) == ()


def test_two_actors_never_hold_the_same_lease(open_run: OpenRun[BrokerRun]) -> None:
    run, other = open_run(), open_run()
    start(run)
    assert run.admission("a").lease(3) == train(0, 1, 2)
    assert other.admission("b").lease(3) == train(3)


def test_heldout_leases_come_first_and_never_count(broker_run: BrokerRun) -> None:
    source = start(broker_run)
    admission = broker_run.admission("a")
    assert len(admission.lease(4)) == 4
    source.request_evaluation(heldout(0, 1, 2))
    assert admission.lease(2) == heldout(0, 1)
    source.release(4)
    assert admission.lease(2) == (*heldout(2), *train(4))
    assert source.stats().admitted == 1


def test_an_evaluation_asked_twice_is_offered_once(broker_run: BrokerRun) -> None:
    source = start(broker_run)
    admission = broker_run.admission("a")
    source.request_evaluation(heldout(0, 1))
    assert admission.lease(1) == heldout(0)
    source.request_evaluation(heldout(0, 1))
    assert admission.lease(3) == (*heldout(1), *train(0, 1))


def test_an_evaluation_asked_again_after_its_answers_is_offered_again(broker_run: BrokerRun) -> None:
    source = start(broker_run)
    source.request_evaluation(heldout(0))
    (lease,) = broker_run.admission("a").lease(1)
    assert offer(broker_run, 1, lease).status is EnqueueStatus.OK
    source.request_evaluation(heldout(0))
    assert broker_run.admission("a").lease(1) == heldout(0)
    assert offer(broker_run, 2, lease).status is EnqueueStatus.OK


def test_handed_back_leases_are_granted_next_in_order(broker_run: BrokerRun) -> None:
    source = start(broker_run)
    admission = broker_run.admission("a")
    admission.lease(4)
    admission.hand_back(train(2))
    admission.hand_back(train(0, 1))
    assert (source.stats().returned, source.stats().leased) == (3, 1)
    assert broker_run.admission("b").lease(9) == train(0, 1, 2)
    assert source.stats().admitted == 4


def test_only_the_holder_hands_back(broker_run: BrokerRun) -> None:
    source = start(broker_run)
    broker_run.admission("a").lease(2)
    broker_run.admission("b").hand_back(train(0, 1))
    broker_run.admission("a").hand_back(train(0))
    broker_run.admission("a").hand_back(train(0))
    assert (source.stats().returned, source.stats().leased) == (1, 1)


def test_expired_leases_go_to_the_next_actor_without_a_new_admission(broker_run: BrokerRun) -> None:
    source = start(broker_run, SHORT)
    assert broker_run.admission("a").lease(4) == train(0, 1, 2, 3)
    taken = eventually(lambda: broker_run.admission("b").lease(9))
    assert taken == train(0, 1, 2, 3)
    assert source.stats().admitted == 4


def test_renew_keeps_ours_and_names_the_lost(broker_run: BrokerRun) -> None:
    start(broker_run, SHORT)
    mine, other = broker_run.admission("a"), broker_run.admission("b")
    mine.lease(4)
    assert eventually(lambda: other.lease(1)) == train(0)
    assert mine.renew(train(0)) == train(0)
    assert other.renew(train(0)) == ()


def test_renewed_leases_do_not_expire(broker_run: BrokerRun) -> None:
    source = start(broker_run, dataclasses.replace(LIMITS, max_staleness=0, lease_s=3.0))
    mine, other = broker_run.admission("a"), broker_run.admission("b")
    source.request_evaluation(heldout(0))
    (kept,) = mine.lease(1)
    mine.lease(2)

    def renew_and_look() -> tuple[Lease, ...]:
        assert mine.renew([kept]) == ()
        return other.lease(9)

    assert eventually(renew_and_look) == train(0, 1)


def test_after_a_crash_the_learner_recounts_what_is_there(open_run: OpenRun[BrokerRun]) -> None:
    run = open_run()
    source = start(run)
    admission = run.admission("a")
    leases = admission.lease(4)
    for seq in (1, 2):
        offer(run, seq, leases[seq - 1])
    admission.hand_back(leases[3:])
    source.release(2)
    source.request_evaluation(heldout(0))
    # The learner dies; its checkpoint holds the first group only.
    successor = open_run()
    successor.run_store.create(b"{}", {}, fence=2)
    resumed = successor.source(2, LIMITS)
    resumed.initialise(durable({"a.0": 1}, consumed=1, next_index=1))
    successor.run_store.set_phase("running", fence=2)
    # Queued 1, leased 2, handed back 3; the held-out lease that nobody waits for is gone.
    stats = resumed.stats()
    assert (stats.queued, stats.leased, stats.returned, stats.admitted) == (1, 1, 1, 3)
    assert admission.lease(9) == train(3, 4)


def test_leases_begin_where_the_surviving_history_ended(broker_run: BrokerRun) -> None:
    start(broker_run)
    source = broker_run.source(1, LIMITS)
    source.initialise(durable({"a.0": 7}, consumed=7, next_index=9))
    assert broker_run.admission("b").lease(2) == train(9, 10)


def test_holes_return_to_the_front_and_what_was_received_is_not_granted_again(open_run: OpenRun[BrokerRun]) -> None:
    run = open_run()
    start(run, dataclasses.replace(LIMITS, max_staleness=4))
    admission = run.admission("a")
    leases = admission.lease(8)
    offer(run, 1, leases[2])
    admission.hand_back(leases[4:6])
    # The learner holds 0, 3, 4 and 6; of 7 it knows nothing, and 2 is in the queue.
    source = run.source(1, LIMITS)
    source.initialise(durable(consumed=1, waiting=3, next_index=7, holes=(1, 2, 5)))
    stats = source.stats()
    assert (stats.leased, stats.returned, stats.queued, stats.admitted) == (2, 1, 1, 3 + 4)
    assert admission.renew(leases) == (*train(0), *train(2, 3, 4, 5, 6))
    admission.hand_back(train(1))
    assert run.admission("b").lease(9) == train(1, 5)


def test_an_empty_redis_grants_what_was_never_received(broker_run: BrokerRun) -> None:
    source = start(broker_run, dataclasses.replace(LIMITS, max_staleness=4))
    source.initialise(durable({"a.0": 3}, consumed=2, waiting=1, next_index=6, holes=(1, 3, 4)))
    assert source.stats().admitted == 4
    assert broker_run.admission("a").lease(4) == train(1, 3, 4, 6)
    source.initialise(durable({"a.0": 3}, consumed=2, waiting=1, next_index=6, holes=(1, 3, 4)))
    assert (source.stats().leased, source.stats().returned, source.stats().admitted) == (4, 0, 5)


def test_a_lost_answer_may_be_given_again(broker_run: BrokerRun) -> None:
    source = start(broker_run)
    broker_run.admission("a").lease(1)
    offer(broker_run, 1, *train(0))
    # It was read and lost with the learner, and its mark says so: the number is used up, the prompt is not.
    source.initialise(durable({"a.0": 1}, next_index=1, holes=(0,)))
    assert broker_run.admission("b").lease(1) == train(0)
    assert offer(broker_run, 1, *train(0), producer="b.0").status is EnqueueStatus.OK


def test_a_duplicate_leaves_the_gate(broker_run: BrokerRun) -> None:
    source = start(broker_run)
    offer(broker_run, 1, *train(0))
    offer(broker_run, 2, *train(1))
    source.read(9, timeout_s=1.0)
    for _ in range(2):
        source.commit({"a.0": 2}, duplicates=[("a.0", 1)])
    assert source.stats().admitted == 1


def test_leases_stop_where_an_answer_could_be_refused_for_its_bytes(broker_run: BrokerRun) -> None:
    limits = dataclasses.replace(LIMITS, max_staleness=9, max_bytes=1000, group_bytes=300)
    source = start(broker_run, limits)
    admission = broker_run.admission("a")
    (first, second, third) = admission.lease(9)
    assert admission.lease(1) == ()
    # A small answer leaves room for another lease only together with what is held.
    offer(broker_run, 1, first, payload=bytes(100))
    assert admission.lease(9) == train(3)
    for seq, lease in enumerate((second, third, *train(3)), start=2):
        assert offer(broker_run, seq, lease, payload=bytes(300)).status is EnqueueStatus.OK
    assert admission.lease(1) == ()
    source.read(9, timeout_s=1.0)
    source.commit({"a.0": 2})
    assert admission.lease(9) == train(4)


def test_leases_stop_where_an_answer_could_be_refused_for_its_place(broker_run: BrokerRun) -> None:
    source = start(broker_run, dataclasses.replace(LIMITS, max_staleness=9, max_groups=3))
    admission = broker_run.admission("a")
    source.request_evaluation(heldout(0))
    held = admission.lease(9)
    assert held == (*heldout(0), *train(0, 1))
    admission.hand_back(train(1))
    assert admission.lease(9) == train(1)
    for seq, lease in enumerate(held, start=1):
        assert offer(broker_run, seq, lease).status is EnqueueStatus.OK


def test_a_reservation_expires_with_its_lease(broker_run: BrokerRun) -> None:
    start(broker_run, dataclasses.replace(SHORT, max_groups=2))
    assert broker_run.admission("a").lease(9) == train(0, 1)
    assert eventually(lambda: broker_run.admission("b").lease(9)) == train(0, 1)
