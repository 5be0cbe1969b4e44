"""The published run, the fleet and the weights, in memory and in Redis."""

import pytest

from lambdapo_async.broker.heartbeat import Heartbeat
from lambdapo_async.errors import BrokerError, RunNotFoundError
from tests.contract.broker_world import SHORT, start, until
from tests.redis_fixtures import BrokerRun, OpenRun
from tests.weight_files import full


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
    with pytest.raises(RunNotFoundError, match="rows"):
        broker_run.run_store.row("train", 0)
    with pytest.raises(RunNotFoundError, match="model files"):
        broker_run.run_store.model_files()


def test_phases_and_versions_are_seen(broker_run: BrokerRun) -> None:
    broker_run.run_store.create(b"{}", {}, fence=1)
    state = broker_run.run_store.state()
    assert (state.phase, state.version, state.schema) == ("starting", -1, 3)
    assert state.epoch
    broker_run.weights.publish(0, [full(0)], consumed=0, fence=1)
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
