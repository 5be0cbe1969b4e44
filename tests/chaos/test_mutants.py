"""Each way of breaking the protocol is seen: a mutant that nobody catches is a hole in the ledger."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from lambdapo_async.broker.client import Broker
from tests.chaos.campaign import run_mutant
from tests.chaos.folders import scene_folder
from tests.chaos.ledger import Bounds, Ledger, Remains, check, read_ledger
from tests.chaos.mutants import MUTANTS, retry_inside_redis_py
from tests.chaos.proxy import Proxy
from tests.chaos.redis_control import RedisControl


@pytest.fixture
def folder() -> Iterator[Path]:
    with scene_folder("mutant") as path:
        yield path


def shown(folder: Path, name: str, *, is_broken: bool) -> set[str]:
    """Violations in the ledger."""
    outcome = run_mutant(folder, name, seed=1, is_broken=is_broken)
    return {violation.kind for violation in outcome.violations}


@pytest.mark.system
@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_promise_is_noticed(folder: Path, name: str) -> None:
    kinds = shown(folder, name, is_broken=True)
    assert kinds & set(MUTANTS[name].caught), f"not caught; the ledger shows {kinds}"


@pytest.mark.system
@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", MUTANTS)
def test_the_same_faults_alone_are_no_reason(folder: Path, name: str) -> None:
    """Or it would not be the mutant that was noticed."""
    assert shown(folder, name, is_broken=False) == set()


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
