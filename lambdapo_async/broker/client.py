"""A Redis client whose calls are repeated until a deadline.

Every operation of this package is idempotent (sequence numbers, fences, request ids), which is what makes repeating a
call after a lost reply safe. redis-py's own retries are off: they would repeat calls that are not.
"""

import random
import time
from collections.abc import Callable
from typing import Any

import redis

from lambdapo_async.broker.connection import BrokerRefusedError, connect, redact
from lambdapo_async.errors import BrokerError, BrokerUnavailable

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 1.0


class Broker:
    """One client and the deadline of its calls; safe to share between threads."""

    def __init__(self, url: str, *, timeout_s: float) -> None:
        self._shown_url, self._timeout_s = redact(url), timeout_s
        # One reply may take a third of the deadline, so that a lost one leaves time to ask again.
        self._reply_timeout_s = timeout_s / 3
        self._client = connect(url, timeout_s=self._reply_timeout_s)

    @property
    def longest_block_s(self) -> float:
        """Seconds that a blocking command may wait inside the server before our socket gives up."""
        return self._reply_timeout_s / 2

    def close(self) -> None:
        """Close the connections; the next call opens new ones."""
        self._client.close()

    def call(self, operation: Callable[[redis.Redis], object]) -> Any:
        """``operation(client)``, repeated after connection errors; it must be idempotent.

        The reply is untyped because redis-py's own types leave open whether replies are decoded; ours never are.

        Raises:
            BrokerUnavailable: still no answer at the deadline.
            BrokerRefusedError: wrong password, missing right, or not a Redis.
            BrokerError: Redis rejected the command, for example because it is out of memory.
        """
        started, pause_s = time.monotonic(), _FIRST_PAUSE_S
        while True:
            try:
                return operation(self._client)
            except (redis.AuthenticationError, redis.exceptions.AuthorizationError) as error:
                raise BrokerRefusedError(f"{self._shown_url}: {error}: check user and password of the URL") from error
            except (redis.ConnectionError, redis.TimeoutError) as error:
                elapsed_s = time.monotonic() - started
                if elapsed_s + pause_s > self._timeout_s:
                    raise BrokerUnavailable(
                        f"{self._shown_url} did not answer for {elapsed_s:.1f} s "
                        f"(deadline {self._timeout_s:g} s): {error}"
                    ) from error
            except redis.RedisError as error:
                raise self._refusal(error) from error
            time.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _refusal(self, error: redis.RedisError) -> BrokerError:
        match error:
            case redis.InvalidResponse():
                return BrokerRefusedError(f"{self._shown_url} does not speak the Redis protocol: {error}")
            case redis.exceptions.NoPermissionError():
                return BrokerRefusedError(f"{self._shown_url}: {error}: check the rights of the URL's user")
            case redis.OutOfMemoryError():
                return BrokerError(f"{self._shown_url} is out of memory: raise its maxmemory or lower broker.max_bytes")
            case redis.ResponseError() if "NOAUTH" in str(error) or "WRONGPASS" in str(error):
                return BrokerRefusedError(f"{self._shown_url}: {error}: check user and password of the URL")
        return BrokerError(f"{self._shown_url} answered: {error}")
