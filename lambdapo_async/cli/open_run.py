"""A run that is there, opened to be looked at."""

import contextlib
import os
from collections.abc import Iterator

from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.config.load import HMAC_KEY_VARIABLE, REDIS_URL_VARIABLE
from lambdapo_async.errors import ConfigError

_TIMEOUT_S = 30.0


@contextlib.contextmanager
def open_run(run_id: str, redis_url: str | None) -> Iterator[RedisRun]:
    """Connect to ``run_id`` at ``redis_url`` or ``REDIS_URL``.

    Raises:
        ConfigError: no URL.
        BrokerUnavailable: nobody answers there.
        RunNotFoundError: it holds no such run.
    """
    url = redis_url or os.environ.get(REDIS_URL_VARIABLE)
    if not url:
        raise ConfigError(f"no Redis: give --redis-url redis://host:6379 or set {REDIS_URL_VARIABLE}")
    with contextlib.closing(
        RedisRun(url, run_id, timeout_s=_TIMEOUT_S, hmac_key=os.environ.get(HMAC_KEY_VARIABLE))
    ) as run:
        run.check_reachable()
        run.run_store.state()  # a run that is not there is told from one of which nothing is known yet
        yield run
