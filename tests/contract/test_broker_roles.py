"""The broker's contract once more, with learner and actors as Redis users of their own; and what each may not."""

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

from lambdapo_async.broker.acl import FIRST_WITH_READ_ONLY_KEYS, rules
from lambdapo_async.broker.connection import BrokerRefusedError
from lambdapo_async.broker.redis_run import RedisRun
from tests.contract import (
    test_broker_admission,
    test_broker_fleet_control,
    test_broker_partials,
    test_broker_queue,
    test_broker_run,
)
from tests.contract.broker_world import start
from tests.contract.test_broker_run import heartbeat
from tests.redis_fixtures import TIMEOUT_S, next_run_id
from tests.redis_server import AOF, RedisServer, own_server
from tests.roles import RoleRun, server_major
from tests.weight_files import full

MAJOR = server_major()
if MAJOR < FIRST_WITH_READ_ONLY_KEYS:
    pytest.skip("this Redis has no keys that may only be read", allow_module_level=True)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with own_server(tmp_path_factory.mktemp("guarded"), AOF) as server:
        yield server


@pytest.fixture
def open_run(guarded: RedisServer) -> Iterator[Callable[[], RoleRun]]:
    run_id = next_run_id()
    for role in ("learner", "actor"):
        guarded.client.execute_command("ACL", "SETUSER", role, *rules(role, run_id, redis_major=MAJOR), f">{role}-pw")
    with contextlib.ExitStack() as opened:

        def open_process() -> RoleRun:
            learner, actor = (
                RedisRun(guarded.url.replace("unix://", f"unix://{role}:{role}-pw@"), run_id, timeout_s=TIMEOUT_S)
                for role in ("learner", "actor")
            )
            return opened.enter_context(contextlib.closing(RoleRun(learner, actor)))

        yield open_process


def contract_of(module: ModuleType) -> dict[str, object]:
    return {name: found for name, found in vars(module).items() if name.startswith("test_")}


_MODULES = (
    test_broker_admission, test_broker_fleet_control, test_broker_partials, test_broker_queue, test_broker_run
)  # fmt: skip
for _module in _MODULES:
    globals().update(contract_of(_module))


@pytest.fixture
def broker_run(open_run: Callable[[], RoleRun]) -> RoleRun:
    return open_run()


def test_an_actor_cannot_write_weights(broker_run: RoleRun) -> None:
    start(broker_run)  # type: ignore[arg-type]
    broker_run.learner.weights.publish(1, [full(1)], consumed=0, fence=1)
    keys = broker_run.keys
    with pytest.raises(BrokerRefusedError, match="check the rights"):
        broker_run.actor.weights.publish(2, [full(2)], consumed=0, fence=1)
    for write in (
        lambda client: client.set(keys.weights_head, 9),
        lambda client: client.set(keys.weights_chunk("1.full", 0), b"evil"),
        lambda client: client.hset(keys.weights_files, "x", "y"),
        lambda client: client.delete(keys.weights_begun),
        lambda client: client.set(keys.weights_canary, b"evil"),
        lambda client: client.srem(keys.quarantined, "a"),
        lambda client: client.set(keys.config, b"evil"),
        lambda client: client.hset(keys.rows("train"), "0", b"evil"),
        lambda client: client.hset(keys.model_files, "config.json", b"evil"),
        lambda client: client.flushall(),
        lambda client: client.config_set("maxmemory", 1),
        lambda client: client.set("another", 1),
    ):
        with pytest.raises(BrokerRefusedError, match="check the rights"):
            broker_run.actor._broker.call(write)
    (file,) = broker_run.actor.weights.files()
    assert broker_run.actor.weights.fetch(file) == full(1).payload


def test_the_learner_cannot_forge_heartbeats(broker_run: RoleRun) -> None:
    start(broker_run)  # type: ignore[arg-type]
    with pytest.raises(BrokerRefusedError, match="check the rights"):
        broker_run.learner.fleet.beat(heartbeat("a"))
    with pytest.raises(BrokerRefusedError, match="check the rights"):
        broker_run.learner._broker.call(lambda client: client.hset(broker_run.keys.fleet, "a", b"x"))
    broker_run.actor.fleet.beat(heartbeat("a"))
    assert broker_run.learner.fleet.members() == (heartbeat("a"),)


def test_a_user_of_one_run_cannot_read_another(broker_run: RoleRun, guarded: RedisServer) -> None:
    guarded.client.set("{lp:other}:config", b"secret")
    with pytest.raises(BrokerRefusedError, match="check the rights"):
        broker_run.actor._broker.call(lambda client: client.get("{lp:other}:config"))


def test_an_actor_sees_which_runs_there_are(broker_run: RoleRun) -> None:
    start(broker_run)  # type: ignore[arg-type]
    assert broker_run.keys.run_id in broker_run.actor.run_ids()


def test_a_wrong_password_is_refused(guarded: RedisServer) -> None:
    url = guarded.url.replace("unix://", "unix://actor:wrong@")
    with (
        contextlib.closing(RedisRun(url, "r", timeout_s=TIMEOUT_S)) as run,
        pytest.raises(BrokerRefusedError, match="check user and password"),
    ):
        run.run_store.state()
