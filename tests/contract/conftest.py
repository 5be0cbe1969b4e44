"""Fixtures of the contract tests: the real Redis itself, and a run in it that is under way."""

import contextlib
from collections.abc import Iterator

import pytest
import redis

from lambdapo_async.broker.connection import connect
from lambdapo_async.broker.redis_run import RedisRun
from tests.contract.broker_world import start
from tests.redis_fixtures import TIMEOUT_S


@pytest.fixture
def server(redis_url: str) -> Iterator[redis.Redis]:
    """Redis itself, behind the broker's back."""
    with contextlib.closing(connect(redis_url, timeout_s=TIMEOUT_S)) as client:
        yield client


@pytest.fixture
def started(redis_run: RedisRun) -> RedisRun:
    """``redis_run`` under way."""
    start(redis_run)
    return redis_run
