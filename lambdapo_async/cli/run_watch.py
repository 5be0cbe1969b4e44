"""The demo's view of Redis: which server, and what it knows of the run."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from lambdapo_async.broker.connection import embedded_server
from lambdapo_async.broker.heartbeat import Heartbeat
from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.config.load import HMAC_KEY_VARIABLE, REDIS_URL_VARIABLE
from lambdapo_async.errors import RunNotFoundError

_TIMEOUT_S = 10.0


@contextmanager
def demo_redis(environ: Mapping[str, str], folder: Path) -> Iterator[str]:
    """The URL of the Redis that the environment names, or of a private one in ``folder`` that ends with the block."""
    if url := environ.get(REDIS_URL_VARIABLE):
        yield url
        return
    with embedded_server(folder) as url:
        yield url


class BrokerWatch:
    """Reads a run's state and fleet; writes nothing."""

    def __init__(self, url: str, run_id: str) -> None:
        self._run = RedisRun(url, run_id, timeout_s=_TIMEOUT_S, hmac_key=os.environ.get(HMAC_KEY_VARIABLE))

    def check_reachable(self) -> None:
        """``BrokerUnreachableError`` when nobody answers, ``BrokerRefusedError`` when we are not let in."""
        self._run.check_reachable()

    def is_published(self) -> bool:
        """Whether actors can join."""
        try:
            self._run.run_store.config_json()
        except RunNotFoundError:
            return False
        return True

    def fleet(self) -> Sequence[Heartbeat]:
        """The actors that live."""
        return self._run.fleet.members()
