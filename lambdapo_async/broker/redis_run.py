"""All seams of one run in one Redis."""

import contextlib
from functools import partial

import redis

from lambdapo_async.broker.admission import RedisAdmission
from lambdapo_async.broker.client import Broker
from lambdapo_async.broker.fleet import RedisFleet
from lambdapo_async.broker.fleet_control import RedisFleetControl
from lambdapo_async.broker.limits import RunLimits
from lambdapo_async.broker.ownership import Ownership
from lambdapo_async.broker.partials import RedisPartials
from lambdapo_async.broker.rollout_sink import RedisRolloutSink
from lambdapo_async.broker.rollout_source import RedisRolloutSource
from lambdapo_async.broker.run_store import RedisRunStore
from lambdapo_async.config.weights import WeightsConfig
from lambdapo_async.errors import BrokerUnavailable, BrokerUnreachableError
from lambdapo_async.keys import ANY_RUN, RunKeys, run_id_of
from lambdapo_async.seal import Seal
from lambdapo_async.weights.canary_store import RedisCanaryStore
from lambdapo_async.weights.redis_store import RedisWeightStore

_FIRST_CONTACT_S = 5.0
_SCANNED_AT_ONCE, _MOST_SCANS = 10_000, 100  # a person waits, and so does the server while it scans


class RedisRun:
    """What one process knows of a run; thread-safe, connects at the first call.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://``.
        run_id: names the run's keys.
        timeout_s: deadline of each call, repetitions included.
        hmac_key: ``broker.hmac_key``; None for a run whose messages are not signed.
    """

    def __init__(self, url: str, run_id: str, *, timeout_s: float, hmac_key: str | None = None) -> None:
        self.keys = RunKeys(run_id)
        self.seal = Seal(hmac_key, run_id=run_id)
        self._url, self._timeout_s = url, timeout_s
        self._broker = Broker(url, timeout_s=timeout_s)
        self._ownership = Ownership(self._broker, self.keys)
        self.run_store = RedisRunStore(self._broker, self.keys, self._ownership, self.seal)
        self.fleet = RedisFleet(self._broker, self.keys)
        self.weights = RedisWeightStore(self._broker, self.keys, WeightsConfig(), self.seal)
        self.canary = RedisCanaryStore(self._broker, self.keys)

    def check_reachable(self) -> None:
        """Wait five seconds at most for a first answer: a person is waiting, and the URL may be wrong.

        Raises:
            BrokerUnreachableError: nobody answers there.
            BrokerRefusedError: somebody who does not let us in, or no Redis.
        """
        with contextlib.closing(Broker(self._url, timeout_s=min(_FIRST_CONTACT_S, self._timeout_s))) as broker:
            try:
                broker.call(_ping)
            except BrokerUnavailable as error:
                raise BrokerUnreachableError(f"{error}; does it run, and is its URL right?") from error

    def run_ids(self) -> tuple[str, ...]:
        """Runs in this Redis, in alphabetical order, as far as its first million keys tell."""

        found, cursor = set[bytes](), 0
        for _ in range(_MOST_SCANS):
            cursor, names = self._broker.call(partial(_scan, cursor=cursor))
            found.update(names)
            if cursor == 0:
                break
        return tuple(sorted(map(run_id_of, found)))

    def wait_at_most(self, seconds: float) -> None:
        """Change the deadline of every call, the running ones included."""
        self._broker.wait_at_most(seconds)

    def admission(self, actor_id: str) -> RedisAdmission:
        """The leases of one actor."""
        return RedisAdmission(self._broker, self.keys, actor_id)

    def partials(self, actor_id: str) -> RedisPartials:
        """Unfinished groups, as one actor leaves and takes them."""
        return RedisPartials(self._broker, self.keys, actor_id)

    def sink(self) -> RedisRolloutSink:
        """The actor's end of the queue; its producers are named ``<actor_id>.<number>``, as leases are by actor."""
        return RedisRolloutSink(self._broker, self.keys, self.seal)

    def weights_for(self, config: WeightsConfig) -> RedisWeightStore:
        """The learner's end of ``weights``, which publishes as ``config`` says; readers need no config."""
        return RedisWeightStore(self._broker, self.keys, config, self.seal)

    def fleet_control(self, fence: int) -> RedisFleetControl:
        """The learner's hand on the fleet."""
        return RedisFleetControl(self._broker, self.keys, fence)

    def source(self, fence: int, limits: RunLimits) -> RedisRolloutSource:
        """The learner's end of the queue."""
        return RedisRolloutSource(self._broker, self.keys, self._ownership, fence, limits)

    def close(self) -> None:
        """Close the connections."""
        self._broker.close()


def _scan(client: redis.Redis, *, cursor: int) -> object:
    return client.scan(cursor, RunKeys(ANY_RUN).state, _SCANNED_AT_ONCE)


def _ping(client: redis.Redis) -> None:
    with contextlib.suppress(redis.exceptions.BusyLoadingError):  # it reads its data first, but it is there
        client.ping()
