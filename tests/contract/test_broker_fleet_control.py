"""Actors that are set aside, in memory and in Redis."""

import pytest

from lambdapo_async.errors import FencedError
from tests.contract.broker_world import heldout, start, train
from tests.contract.test_broker_run import heartbeat
from tests.redis_fixtures import BrokerRun, OpenRun


def test_an_actor_that_is_set_aside_gets_nothing_and_its_leases_go_on(open_run: OpenRun[BrokerRun]) -> None:
    run, other = open_run(), open_run()
    source = start(run)
    source.request_evaluation(heldout(0))
    bad, good = run.admission("bad"), other.admission("good")
    assert bad.lease(3) == (*heldout(0), *train(0, 1))
    assert good.lease(1) == train(2)
    assert run.fleet.beat(heartbeat("bad")) is False

    control = run.fleet_control(1)
    control.quarantine(["bad"])
    control.quarantine(["bad"])
    assert run.fleet.beat(heartbeat("bad")) is True
    assert run.fleet.beat(heartbeat("good")) is False
    assert bad.lease(3) == ()
    assert set(bad.renew([*heldout(0), *train(0, 1)])) == {*heldout(0), *train(0, 1)}
    assert good.lease(9) == (*heldout(0), *train(0, 1, 3))
    assert good.renew(train(2)) == (), "what others hold is theirs still"

    control.readmit(["bad"])
    assert run.fleet.beat(heartbeat("bad")) is False
    source.release(1)
    assert bad.lease(1) == train(4)


def test_a_later_learner_finds_who_is_set_aside(open_run: OpenRun[BrokerRun]) -> None:
    first, second = open_run(), open_run()
    start(first)
    old = first.fleet_control(1)
    old.quarantine(["a", "b"])
    start(second, fence=2)
    assert second.fleet_control(2).quarantined() == {"a", "b"}
    for call in (old.quarantine, old.readmit):
        with pytest.raises(FencedError):
            call(["a"])
    assert second.fleet_control(2).quarantined() == {"a", "b"}
