"""A private Redis for the tests, and both kinds of run on one fixture."""

import itertools
from collections.abc import Iterator

import pytest

from lambdapo_async.broker.connection import embedded_server
from lambdapo_async.broker.redis_run import RedisRun
from tests.fakes_broker import FakeRun

TIMEOUT_S = 10.0

_run_numbers = itertools.count()

BrokerRun = RedisRun | FakeRun


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a real Redis that is ours alone."""
    with embedded_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def redis_run(redis_url: str) -> Iterator[RedisRun]:
    """A fresh run id in the real Redis."""
    run = RedisRun(redis_url, f"test-{next(_run_numbers)}", timeout_s=TIMEOUT_S)
    yield run
    run.close()


@pytest.fixture(params=["fake", "redis"])
def broker_run(request: pytest.FixtureRequest) -> BrokerRun:
    """A fresh run, once in memory and once in the real Redis."""
    if request.param == "fake":
        return FakeRun("test")
    run: RedisRun = request.getfixturevalue("redis_run")
    return run
