"""Unfinished groups over Redis: what one actor sampled of a lease, for the actor that holds it next."""

from typing import Protocol

import redis

from lambdapo_async.broker.client import Broker
from lambdapo_async.broker.replies import exactly
from lambdapo_async.broker.script import Script
from lambdapo_async.keys import RunKeys
from lambdapo_async.rollout import Lease

KEPT_S = 3600.0
"""Seconds that a partial waits for its next actor: after that its tokens are too old to be worth continuing."""
SHARE_OF_QUEUE = 8
"""All partials together take at most an eighth of ``broker.max_bytes``, beside the queue."""


class PartialStore(Protocol):
    """Unfinished groups between two actors, bounded in bytes and time; to lose one costs only its tokens."""

    def leave(self, lease: Lease, payload: bytes) -> bool:
        """Keep what was sampled of a lease that we hold and hand back next; False if it is lost or nothing fits."""

    def take(self, lease: Lease) -> bytes | None:
        """What was left of a lease that we hold; None for nothing, empty bytes where it was lost."""

    def forget(self, lease: Lease) -> None:
        """Delete it: the group is on its way, or the partial is of no use."""


class RedisPartials:
    """One actor's view (see ``PartialStore``).

    Bytes are counted from what is there at each call, so no crash can make the count drift.
    """

    def __init__(self, broker: Broker, keys: RunKeys, actor_id: str, *, kept_s: float = KEPT_S) -> None:
        self._broker, self._keys, self._actor_id, self._kept_s = broker, keys, actor_id, kept_s
        self._leave = Script(broker, "partial_leave")
        self._take = Script(broker, "partial_take")

    def leave(self, lease: Lease, payload: bytes) -> bool:
        """Keep ``payload``; False if the lease is not ours any more or the budget is spent."""
        keys = self._keys
        reply = self._leave(
            [keys.state, keys.holders, keys.partials, keys.partial(lease)],
            [self._actor_id, lease.id, payload, int(self._kept_s * 1000), SHARE_OF_QUEUE],
        )
        (status,) = exactly(reply, 1)
        return status == b"OK"

    def take(self, lease: Lease) -> bytes | None:
        """What was left of a lease that we hold; None for nothing, empty bytes where Redis lost it."""
        keys = self._keys
        reply = self._take([keys.holders, keys.partials, keys.partial(lease)], [self._actor_id, lease.id])
        return reply[0] if reply and isinstance(reply[0], bytes) else None

    def forget(self, lease: Lease) -> None:
        """Delete it: the group is on its way, or the partial is of no use."""

        def delete(client: redis.Redis) -> None:
            pipeline = client.pipeline(transaction=True)
            pipeline.hdel(self._keys.partials, lease.id)
            pipeline.unlink(self._keys.partial(lease))
            pipeline.execute()

        self._broker.call(delete)
