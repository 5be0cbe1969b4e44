"""Each way of breaking the protocol is seen: a mutant that nobody catches is a hole in the ledger."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from lambdapo_async.broker.client import Broker
from tests.chaos.campaign import run_mutant
from tests.chaos.folders import scene_folder
from tests.chaos.ledger import Ledger, read_ledger
from tests.chaos.mutants import MUTANTS, retry_inside_redis_py
from tests.chaos.proof import Bounds, Remains, check
from tests.chaos.proxy import Proxy
from tests.chaos.redis_control import RedisControl


@pytest.fixture
def folder() -> Iterator[Path]:
    with scene_folder("mutant") as path:
        yield path


@pytest.mark.system
@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_promise_is_noticed(folder: Path, name: str) -> None:
    violations = run_mutant(folder, name, seed=1).violations
    assert {violation.kind for violation in violations} & set(MUTANTS[name].caught), violations


@pytest.mark.system
@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", MUTANTS)
def test_the_same_faults_alone_are_no_reason(folder: Path, name: str) -> None:
    """Or it would not be the mutant that was noticed."""
    assert run_mutant(folder, name, seed=1, is_broken=False).violations == ()


@pytest.mark.parametrize("is_mutant", [False, True])
def test_a_client_that_retries_by_itself_shows_in_the_ledger(folder: Path, is_mutant: bool) -> None:
    """One plain call with three lost replies is four attempts of our loop, or one that redis-py makes four of.

    No run: our scripts go through round trips of our own, which redis-py does not repeat. What a client that does would
    do to a run is the mutant ``retries_inside_the_client``.
    """
    server, ledger = RedisControl(folder / "r", "none"), Ledger(folder, "actor-1")
    server.start()
    proxy = Proxy(folder / "p", server.socket, hides_run_id=False)
    broker = Broker(proxy.url, timeout_s=10.0)

    def add(client: redis.Redis) -> object:
        ledger.write("attempted")
        if is_mutant:
            retry_inside_redis_py(client)
        return client.xadd("q", {"group": 1})

    try:
        proxy.lose_replies(3, to=b"XADD")
        broker.call(add)
        with contextlib.closing(server.client()) as client:
            executed = client.xlen("q")
    finally:
        broker.close()
        proxy.close()
        server.close()
    remains = Remains(history=(), consumed=0, frontier=0, executed=executed)
    kinds = [violation.kind for violation in check(read_ledger(folder), remains, Bounds(1, 1))]
    assert executed == 4
    assert kinds == ["retried"] * is_mutant
