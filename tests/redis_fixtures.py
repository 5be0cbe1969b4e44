"""A private Redis for the tests, and both kinds of run on one fixture."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Protocol, TypeVar

import pytest

from lambdapo_async.broker.connection import embedded_server
from lambdapo_async.broker.redis_run import RedisRun
from tests.fakes_broker import FakeRun
from tests.fakes_redis_run import FakeRedisRun

TIMEOUT_S = 10.0

_run_numbers = itertools.count()

BrokerRun = RedisRun | FakeRun
Run = TypeVar("Run", bound=BrokerRun, covariant=True)


class OpenRun(Protocol[Run]):
    """Opens one more process of the same run."""

    def __call__(self) -> Run: ...


def next_run_id() -> str:
    """A run id that no other test has."""
    return f"test-{next(_run_numbers)}"


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a real Redis that is ours alone."""
    with embedded_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def open_redis_run(redis_url: str) -> Iterator[OpenRun[RedisRun]]:
    """Opens processes of one fresh run id in the real Redis."""
    run_id = next_run_id()
    with contextlib.ExitStack() as opened:

        def open_run() -> RedisRun:
            return opened.enter_context(contextlib.closing(RedisRun(redis_url, run_id, timeout_s=TIMEOUT_S)))

        yield open_run


@pytest.fixture
def redis_run(open_redis_run: OpenRun[RedisRun]) -> RedisRun:
    """One process of a fresh run in the real Redis."""
    return open_redis_run()


@pytest.fixture(params=["fake", "redis"])
def open_run(request: pytest.FixtureRequest) -> OpenRun[BrokerRun]:
    """Opens processes of one fresh run, once in memory and once in the real Redis."""
    if request.param == "fake":
        shared = FakeRedisRun()
        return lambda: FakeRun("test", shared)
    opener: OpenRun[BrokerRun] = request.getfixturevalue("open_redis_run")
    return opener


@pytest.fixture
def broker_run(open_run: OpenRun[BrokerRun]) -> BrokerRun:
    """One process of that run."""
    return open_run()
