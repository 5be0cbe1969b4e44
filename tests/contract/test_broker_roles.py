"""The broker's contract once more, with learner and actors as Redis users of their own; and what each may not.

Redis 6.2 knows no keys that may only be read: there a user is kept to its run, and a key of the run guards the weights.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from lambdapo_async.broker.acl import FIRST_WITH_READ_ONLY_KEYS, ROLES, Role, rules
from lambdapo_async.broker.connection import BrokerRefusedError, connect
from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.errors import BrokerError, WeightsError
from lambdapo_async.rollout import Lease
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
HAS_READ_ONLY_KEYS = MAJOR >= FIRST_WITH_READ_ONLY_KEYS
with_read_only_keys = pytest.mark.skipif(not HAS_READ_ONLY_KEYS, reason="this Redis has no keys that may only be read")
without_read_only_keys = pytest.mark.skipif(HAS_READ_ONLY_KEYS, reason="here an actor cannot write them at all")
ACL_SCRIPT = Path(__file__).parents[2] / "scripts" / "redis-acl"
KEY = "a key that the run's own processes have"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with own_server(tmp_path_factory.mktemp("guarded"), AOF) as server:
        yield server


@pytest.fixture
def open_run(guarded: RedisServer) -> Iterator[Callable[[], RoleRun]]:
    run_id = next_run_id()
    for role in ROLES:
        guarded.client.execute_command("ACL", "SETUSER", role, *rules(role, run_id, redis_major=MAJOR), f">{role}-pw")
    with contextlib.ExitStack() as opened:

        def open_process() -> RoleRun:
            learner, actor = (as_user(guarded, role, run_id) for role in ("learner", "actor"))
            return opened.enter_context(contextlib.closing(RoleRun(learner, actor)))

        yield open_process


def as_user(server: RedisServer, user: str, run_id: str, *, hmac_key: str | None = None) -> RedisRun:
    url = server.url.replace("unix://", f"unix://{user}:{user}-pw@")
    return RedisRun(url, run_id, timeout_s=TIMEOUT_S, hmac_key=hmac_key)


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


@with_read_only_keys
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
    ):
        with pytest.raises(BrokerRefusedError, match="check the rights"):
            broker_run.actor._broker.call(write)
    (file,) = broker_run.actor.weights.files()
    assert broker_run.actor.weights.fetch(file) == full(1).payload


@without_read_only_keys
def test_weights_that_an_actor_wrote_are_refused_in_a_run_with_a_key(broker_run: RoleRun, guarded: RedisServer) -> None:
    run_id = broker_run.keys.run_id
    with (
        contextlib.closing(as_user(guarded, "learner", run_id, hmac_key=KEY)) as learner,
        contextlib.closing(as_user(guarded, "actor", run_id, hmac_key=KEY)) as reader,
        contextlib.closing(as_user(guarded, "actor", run_id, hmac_key="stolen user, but not the key")) as intruder,
    ):
        start(learner)
        learner.weights.publish(1, [full(1)], consumed=0, fence=1)
        (file,) = reader.weights.files()
        assert reader.weights.fetch(file) == full(1).payload
        intruder.weights.publish(2, [full(2)], consumed=0, fence=1)
        forged = next(one for one in reader.weights.files() if one.version == 2)
        with pytest.raises(WeightsError, match=r"manifest of 2\.full cannot be trusted"):
            reader.weights.fetch(forged)
        intruder._broker.call(lambda client: client.set(broker_run.keys.weights_chunk("1.full", 0), b"evil"))
        with pytest.raises(WeightsError, match="damaged"):
            reader.weights.fetch(file)


@with_read_only_keys
def test_the_learner_cannot_forge_heartbeats(broker_run: RoleRun) -> None:
    start(broker_run)  # type: ignore[arg-type]
    with pytest.raises(BrokerRefusedError, match="check the rights"):
        broker_run.learner.fleet.beat(heartbeat("a"))
    with pytest.raises(BrokerRefusedError, match="check the rights"):
        broker_run.learner._broker.call(lambda client: client.hset(broker_run.keys.fleet, "a", b"x"))
    broker_run.actor.fleet.beat(heartbeat("a"))
    assert broker_run.learner.fleet.members() == (heartbeat("a"),)


@pytest.mark.parametrize("role", ROLES)
def test_no_user_may_do_more_than_a_run_needs(broker_run: RoleRun, role: Role) -> None:
    start(broker_run)  # type: ignore[arg-type]
    for attempt in (
        lambda client: client.flushall(),
        lambda client: client.flushdb(),
        lambda client: client.keys("*"),
        lambda client: client.config_set("maxmemory", 1),
        lambda client: client.config_get("*"),
        lambda client: client.acl_setuser("another", enabled=True, nopass=True, categories=["+@all"]),
        lambda client: client.replicaof("elsewhere", 1),
        lambda client: client.set("another", 1),
        lambda client: client.set("{lp:other}:config", b"evil"),
        lambda client: client.eval("return redis.call('SET', KEYS[1], 1)", 1, "another"),
        lambda client: client.eval("return redis.call('SET', 'another', 1)", 0),
        lambda client: client.publish("channel", "x"),
    ):
        with pytest.raises(BrokerError, match=r"check the rights|permission|can't run this command|can't access"):
            getattr(broker_run, role)._broker.call(attempt)


def test_the_printed_rules_make_the_two_users(tmp_path: Path) -> None:
    printed = subprocess.run(
        [ACL_SCRIPT, "a-run", "--redis", str(MAJOR)],
        env={**os.environ, "LAMBDAPO_VENV": sys.prefix},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    with own_server(tmp_path, AOF) as server, contextlib.ExitStack() as opened:
        for line in printed.splitlines():
            for role in (*ROLES, "admin"):
                line = line.replace(f"{role.upper()}-PASSWORD", f"lambdapo-{role}-pw")
            assert server.client.execute_command(*line.split()) == b"OK"
        learner, actor = (
            opened.enter_context(contextlib.closing(as_user(server, f"lambdapo-{role}", "a-run")))
            for role in ("learner", "actor")
        )
        start(learner)
        learner.weights.publish(1, [full(1)], consumed=0, fence=1)
        assert actor.admission("a").lease(1) == (Lease("train", 0),)
        assert not actor.fleet.beat(heartbeat("a"))
        assert learner.fleet.members() == (heartbeat("a"),)
        as_admin = server.url.replace("unix://", "unix://lambdapo-admin:lambdapo-admin-pw@")
        with contextlib.closing(connect(as_admin, timeout_s=TIMEOUT_S)) as admin:
            assert admin.config_get("maxmemory")
        (file,) = actor.weights.files()
        assert actor.weights.fetch(file) == full(1).payload
        with (
            contextlib.closing(RedisRun(server.url, "a-run", timeout_s=TIMEOUT_S)) as stranger,
            pytest.raises(BrokerRefusedError, match="check user and password"),
        ):
            stranger.run_store.state()


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
