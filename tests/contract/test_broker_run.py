"""The published run, the fleet and the weights, in memory and in Redis."""

import dataclasses
import threading

import pytest

from lambdapo_async.broker.interface import Heartbeat
from lambdapo_async.errors import BrokerError, RunNotFoundError, WeightsError
from tests.contract.broker_world import FOREVER_S, LIMITS, SHORT, start, until
from tests.redis_fixtures import BrokerRun, OpenRun


def heartbeat(actor_id: str, **changes: object) -> Heartbeat:
    fields: dict[str, object] = {
        "actor_id": actor_id, "host": "h", "pid": 1, "state": "sampling", "device": "cpu", "dtype": "float32",
        "engine": "fake", "policy_version": 3, "groups_in_flight": 1, "groups_sent": 2, "completions": 3, "tokens": 4,
        "tokens_per_s": 5.0, "idle_share": 0.5, "counters": {"updates": 1.0}, "sent_at": 6.0,
    }  # fmt: skip
    return Heartbeat.model_validate(fields | changes)


def test_an_actor_finds_what_it_needs(open_run: OpenRun[BrokerRun]) -> None:
    learner, actor = open_run(), open_run()
    learner.run_store.create(b'{"a": 1}', {"config.json": b"\x00{}"}, fence=1)
    rows = [{"prompt": f"p{index}", "answer": "é", "solution": None} for index in range(600)]
    learner.run_store.put_rows("train", rows)
    learner.run_store.put_rows("heldout", rows[:3])
    store = actor.run_store
    assert (store.config_json(), store.model_files()) == (b'{"a": 1}', {"config.json": b"\x00{}"})
    assert (store.num_rows("train"), store.num_rows("heldout")) == (600, 3)
    assert [store.row("train", index) for index in (0, 255, 256, 599)] == [rows[i] for i in (0, 255, 256, 599)]
    assert store.row("heldout", 2) == rows[2]


@pytest.mark.parametrize("index", [3, 256, -1])
def test_a_row_that_is_not_there(broker_run: BrokerRun, index: int) -> None:
    broker_run.run_store.create(b"{}", {}, fence=1)
    broker_run.run_store.put_rows("train", [{"prompt": "p"}] * 3)
    with pytest.raises(BrokerError, match="no row"):
        broker_run.run_store.row("train", index)


def test_a_resumed_run_replaces_what_was_published(open_run: OpenRun[BrokerRun]) -> None:
    first, second = open_run(), open_run()
    first.run_store.create(b"1", {"old": b"1"}, fence=1)
    first.run_store.put_rows("train", [{"prompt": "p"}] * 600)
    second.run_store.create(b"2", {"new": b"2"}, fence=2)
    second.run_store.put_rows("train", [{"prompt": "q"}] * 300)
    store = open_run().run_store
    assert (store.config_json(), store.model_files(), store.num_rows("train")) == (b"2", {"new": b"2"}, 300)
    with pytest.raises(BrokerError, match="no row"):
        store.row("train", 599)


def test_an_unknown_run_is_named(broker_run: BrokerRun) -> None:
    for ask in (broker_run.run_store.state, broker_run.run_store.config_json):
        with pytest.raises(RunNotFoundError, match="test"):
            ask()
    with pytest.raises(RunNotFoundError, match="rows"):
        broker_run.run_store.num_rows("train")


def test_phases_and_versions_are_seen(broker_run: BrokerRun) -> None:
    broker_run.run_store.create(b"{}", {}, fence=1)
    state = broker_run.run_store.state()
    assert (state.phase, state.version, state.schema) == ("starting", -1, 1)
    assert state.epoch
    broker_run.weights.publish(0, b"weights", consumed=0, fence=1)
    broker_run.run_store.set_phase("running", fence=1)
    after = broker_run.run_store.state()
    assert (after.phase, after.version, after.epoch) == ("running", 0, state.epoch)


def test_the_fleet_is_who_beats(broker_run: BrokerRun) -> None:
    start(broker_run)
    broker_run.fleet.beat(heartbeat("b"))
    broker_run.fleet.beat(heartbeat("a"))
    broker_run.fleet.beat(heartbeat("a", tokens=9))
    assert broker_run.fleet.members() == (heartbeat("a", tokens=9), heartbeat("b"))
    broker_run.fleet.leave("a")
    broker_run.fleet.leave("a")
    assert broker_run.fleet.members() == (heartbeat("b"),)


def test_the_silent_leave_the_fleet(broker_run: BrokerRun) -> None:
    start(broker_run, SHORT)
    broker_run.fleet.beat(heartbeat("a"))
    until(lambda: not broker_run.fleet.members())


def test_a_version_is_fetched_as_it_was_published(open_run: OpenRun[BrokerRun]) -> None:
    learner, actor = open_run(), open_run()
    start(learner)
    payload = bytes(range(256)) * 20_000
    assert actor.weights.head() is None
    learner.weights.publish(4, payload, consumed=0, fence=1)
    assert actor.weights.head() == 4
    assert actor.weights.fetch(4) == payload


@pytest.mark.parametrize("version", [3, 4])
def test_the_head_only_rises(broker_run: BrokerRun, version: int) -> None:
    start(broker_run)
    broker_run.weights.publish(4, b"four", consumed=0, fence=1)
    with pytest.raises(WeightsError, match="not above the head 4"):
        broker_run.weights.publish(version, b"other", consumed=0, fence=1)
    assert (broker_run.weights.head(), broker_run.weights.fetch(4)) == (4, b"four")


def test_the_newest_two_versions_stay(broker_run: BrokerRun) -> None:
    start(broker_run)
    for version in (1, 2, 5):
        broker_run.weights.publish(version, b"v%d" % version, consumed=0, fence=1)
    assert [broker_run.weights.fetch(version) for version in (2, 5)] == [b"v2", b"v5"]
    for version in (1, 3, 6):
        with pytest.raises(WeightsError, match=f"version {version} is gone"):
            broker_run.weights.fetch(version)


def test_waiting_for_a_newer_version(open_run: OpenRun[BrokerRun]) -> None:
    learner, actor = open_run(), open_run()
    start(learner)
    assert actor.weights.wait_newer(-1, timeout_s=0.01) is None
    learner.weights.publish(0, b"zero", consumed=0, fence=1)
    assert actor.weights.wait_newer(-1, timeout_s=FOREVER_S) == 0
    assert actor.weights.wait_newer(0, timeout_s=0.01) is None
    found: list[int | None] = []
    waiter = threading.Thread(target=lambda: found.append(actor.weights.wait_newer(0, timeout_s=FOREVER_S)))
    waiter.start()
    learner.weights.publish(1, b"one", consumed=0, fence=1)
    waiter.join(FOREVER_S)
    assert found == [1]


def test_a_publish_opens_the_gate(broker_run: BrokerRun) -> None:
    start(broker_run, dataclasses.replace(LIMITS, max_staleness=0))
    admission = broker_run.admission("a")
    assert len(admission.lease(9)) == 2
    broker_run.weights.publish(1, b"one", consumed=1, fence=1)
    assert len(admission.lease(9)) == 1
