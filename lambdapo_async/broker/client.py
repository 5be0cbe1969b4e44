"""A Redis client whose calls are repeated until a deadline.

Every operation of this package is idempotent (sequence numbers, fences, request ids), which is what makes repeating a
call after a lost reply safe. redis-py's own retries are off: they would repeat calls that are not.
"""

import logging
import random
import time
from collections.abc import Callable
from typing import Any

import redis

from lambdapo_async.broker.connection import BrokerRefusedError, connect, redact
from lambdapo_async.errors import BrokerError, BrokerUnavailable

logger = logging.getLogger(__name__)

_SILENT = "did not answer"
_TIRED = "did not answer in time (if the link is slow raise broker.timeout_s)"
_DEMOTED = "took no writes (it is a replica)"
_REFUSING = "took no writes (its disk is full, or its replicas are away)"
_FULL = "was out of memory (raise its maxmemory or lower broker.max_bytes)"
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 1.0
_LOGGED_AFTER_S = 2.0


class Broker:
    """One client and the deadline of its calls; safe to share between threads."""

    def __init__(self, url: str, *, timeout_s: float) -> None:
        self._shown_url, self._timeout_s = redact(url), timeout_s
        # One reply, and each part of a request, may take a third of the deadline: a lost one leaves time to ask again.
        self._reply_timeout_s = timeout_s / 3
        self._client = connect(url, timeout_s=self._reply_timeout_s)

    def wait_at_most(self, seconds: float) -> None:
        """Change the deadline of calls, the running ones included; how long one reply may take stays."""
        self._timeout_s = seconds

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
            BrokerUnavailable: still no answer at the deadline, or a full Redis, or one that takes no writes.
            BrokerRefusedError: wrong password, missing right, or not a Redis.
            BrokerError: Redis rejected the command.
        """
        started, pause_s, is_logged = time.monotonic(), _FIRST_PAUSE_S, False
        while True:
            try:
                return operation(self._client)
            except (redis.AuthenticationError, redis.exceptions.AuthorizationError) as error:
                raise BrokerRefusedError(
                    f"{self._shown_url}: {words_of(error)}: check user and password of the URL"
                ) from error
            except redis.RedisError as error:
                problem = _passing(error)
                if problem is None:
                    raise self._refusal(error) from error
                elapsed_s = time.monotonic() - started
                if elapsed_s + pause_s > self._timeout_s:
                    raise BrokerUnavailable(
                        f"{self._shown_url} {problem} for {elapsed_s:.1f} s (deadline {self._timeout_s:g} s): "
                        f"{words_of(error)}"
                    ) from error
                if not is_logged and elapsed_s > _LOGGED_AFTER_S:
                    is_logged = True
                    logger.warning("%s %s; trying for %g s", self._shown_url, problem, self._timeout_s)
                if problem == _DEMOTED:
                    # A new connection may find the new primary; those in use are other threads'.
                    self._client.connection_pool.disconnect(inuse_connections=False)
            time.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _refusal(self, error: redis.RedisError) -> BrokerError:
        match error:
            case redis.InvalidResponse():
                return BrokerRefusedError(f"{self._shown_url} does not speak the Redis protocol: {error}")
            case redis.exceptions.NoPermissionError():
                return BrokerRefusedError(
                    f"{self._shown_url}: {words_of(error)}: check the rights of the URL's user "
                    "(scripts/redis-acl prints them)"
                )
            case redis.ResponseError() if "NOAUTH" in str(error) or "WRONGPASS" in str(error):
                return BrokerRefusedError(f"{self._shown_url}: {words_of(error)}: check user and password of the URL")
        return BrokerError(f"{self._shown_url} answered: {error}")


def words_of(error: redis.RedisError) -> str:
    """What redis-py or the server says, without a full stop: our sentence goes on."""
    return str(error).rstrip(".")


def _passing(error: redis.RedisError) -> str | None:
    """What is wrong, if waiting may help: a restart, a failover, a learner that will make room."""
    if isinstance(error, redis.TimeoutError):
        return _TIRED
    if isinstance(error, redis.ConnectionError):
        return _SILENT
    text = str(error)  # inside a script the server wraps its own errors in it
    if isinstance(error, redis.OutOfMemoryError) or "OOM command not allowed" in text:
        return _FULL
    # A server that is demoted lets go of whoever waits inside it.
    demoted = ("READONLY You can't write", "MASTERDOWN", "UNBLOCKED")
    if isinstance(error, (redis.ReadOnlyError, redis.exceptions.MasterDownError)) or any(
        word in text for word in demoted
    ):
        return _DEMOTED
    if "MISCONF" in text or "NOREPLICAS" in text:
        return _REFUSING
    return _TIRED if "BUSY Redis is busy" in text else None
