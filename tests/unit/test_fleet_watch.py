"""From what groups say of an actor to its quarantine, and back after a canary."""

import math

import pytest

from lambdapo_async import fleet_health
from lambdapo_async.broker.interface import Descriptor
from lambdapo_async.fleet_health import FreshTokens
from lambdapo_async.rollout import Lease
from learner.arrivals import ReceivedGroup
from learner.fleet_watch import FleetWatch
from tests.contract.broker_world import start
from tests.contract.test_broker_run import heartbeat
from tests.fakes_broker import FakeRun
from tests.groups import make_group


class World:
    """A run with actors that beat."""

    def __init__(self) -> None:
        self.run = FakeRun("world")
        start(self.run)
        self.watch = FleetWatch(self.run.fleet_control(1), self.run.fleet)

    def beat(self, actor_id: str, checks: int) -> bool:
        return self.run.fleet.beat(heartbeat(actor_id, counters={"canary_checks": checks}))

    def train(self, **k3: float) -> None:
        """A step on one group of each actor, 1,000 fresh tokens each."""
        groups = []
        for index, actor_id in enumerate(k3):
            group = make_group(index, actor_id=actor_id)
            self.watch.welcomes(group)
            groups.append(
                ReceivedGroup(Descriptor(actor_id, 1, Lease("train", index), 0, 1, 0.0), group, group.rewards, 0)
            )
        self.watch.trained(groups, [FreshTokens(1000, 1000 * value, 0.0) for value in k3.values()])

    def is_welcome(self, actor_id: str) -> bool:
        return self.watch.welcomes(make_group(actor_id=actor_id))


@pytest.fixture
def world() -> World:
    return World()


def test_an_outlier_is_set_aside_told_and_taken_back_after_a_canary(world: World) -> None:
    for actor in ("good", "bad"):
        world.beat(actor, checks=3)
    world.train(good=0.001, bad=0.5)
    world.watch.tend()
    assert (world.is_welcome("good"), world.is_welcome("bad")) == (True, False)
    assert world.beat("bad", checks=3), "it is told with its beat"
    assert not world.beat("good", checks=4)
    world.watch.tend()
    assert not world.is_welcome("bad"), "the canaries that it passed before count for nothing"
    assert world.watch.metrics()["actors/quarantined"] == 1

    world.beat("bad", checks=4)
    world.watch.tend_if_needed()
    assert world.is_welcome("bad")
    assert not world.beat("bad", checks=4)
    metrics = world.watch.metrics()
    assert (metrics["actors/quarantined"], metrics["actors/quarantines"], metrics["actors/readmitted"]) == (0, 1, 1)
    world.watch.tend()
    assert world.is_welcome("bad"), "its past is forgotten"
    world.train(good=0.001, bad=0.5)
    world.watch.tend()
    assert not world.is_welcome("bad"), "and it is judged anew"


def test_a_resumed_learner_takes_over_who_was_set_aside(world: World) -> None:
    world.run.fleet_control(1).quarantine(["bad"])
    assert world.is_welcome("bad")
    world.watch.tend_if_needed()
    assert not world.is_welcome("bad")
    world.beat("bad", checks=7)
    world.watch.tend_if_needed()
    assert not world.is_welcome("bad"), "when its canary passed is not known"
    world.beat("bad", checks=8)
    world.watch.tend_if_needed()
    assert world.is_welcome("bad")


def test_of_many_that_were_set_aside_the_dead_are_forgotten_first(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("learner.fleet_watch.MAX_SET_ASIDE", 2)
    world.beat("alive", checks=1)
    for bad in ("alive", "dead-1", "dead-2", "dead-3"):
        world.train(good=0.001, better=0.001, best=0.001, **{bad: 0.5})
        world.watch.tend()
    world.watch.tend()
    assert world.run.shared.set_aside == {"alive", "dead-3"}
    assert world.watch.metrics()["actors/quarantined"] == 2
    assert not world.is_welcome("alive")


def test_redis_may_forget_who_is_set_aside(world: World) -> None:
    world.beat("bad", checks=1)
    world.train(good=0.001, bad=0.5)
    world.watch.tend()
    world.run.shared.set_aside.clear()
    world.watch.tend()
    assert world.beat("bad", checks=1)


def test_metrics_of_an_unknown_fleet_are_unknown(world: World) -> None:
    metrics = world.watch.metrics()
    assert metrics["actors/quarantined"] == 0
    assert all(math.isnan(metrics[f"actors/{name}"]) for name in ("mismatch_max", "acceptance_min", "truncated_max"))


def test_metrics_name_the_worst(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_health, "MIN_FRESH_TOKENS", 10**9)
    world.train(a=0.001, b=0.002, c=0.3)
    world.is_welcome("a")
    metrics = world.watch.metrics()
    assert (metrics["actors/mismatch_max"], metrics["actors/mismatch_median"]) == (0.3, 0.002)
    assert (metrics["actors/acceptance_min"], metrics["actors/truncated_max"]) == (0.5, 0.0)
