"""Heartbeats over Redis: one small msgpack record per actor, with its expiry by server time."""

import logging

import msgpack
import redis
from pydantic import ValidationError

from lambdapo_async.broker.client import Broker
from lambdapo_async.broker.heartbeat import Heartbeat
from lambdapo_async.broker.replies import as_number, exactly
from lambdapo_async.broker.script import Script
from lambdapo_async.errors import BrokerError
from lambdapo_async.keys import RunKeys

logger = logging.getLogger(__name__)

MAX_HEARTBEAT_BYTES = 16_384
"""A larger record is refused, and never decoded."""


class RedisFleet:
    """Who is there (see ``interface.Fleet``)."""

    def __init__(self, broker: Broker, keys: RunKeys) -> None:
        self._broker, self._keys = broker, keys
        self._members = Script(broker, "members")
        self._beat = Script(broker, "beat")
        self.num_unreadable = 0
        """Records left out so far."""

    def beat(self, heartbeat: Heartbeat) -> bool:
        """Say that we live; True while we are set aside, ``BrokerError`` above 16 kB."""
        record: bytes = msgpack.packb(heartbeat.model_dump())
        if len(record) > MAX_HEARTBEAT_BYTES:
            raise BrokerError(f"a heartbeat of {len(record)} bytes exceeds {MAX_HEARTBEAT_BYTES}: use fewer counters")
        keys = self._keys
        reply = self._beat([keys.state, keys.fleet, keys.fleet_expiry], [heartbeat.actor_id, record, keys.quarantined])
        (is_set_aside,) = exactly(reply, 1)
        return bool(as_number(is_set_aside, "place in the fleet"))

    def members(self) -> tuple[Heartbeat, ...]:
        """Actors whose last heartbeat is younger than ``broker.lease_s``; unreadable records are left out, counted."""
        records = self._members([], [self._keys.fleet, self._keys.fleet_expiry])
        heartbeats = [self._decode(record) for record in records if isinstance(record, bytes)]
        return tuple(heartbeat for heartbeat in heartbeats if heartbeat is not None)

    def leave(self, actor_id: str) -> None:
        """Sign off after a drain."""

        def forget(client: redis.Redis) -> None:
            pipeline = client.pipeline(transaction=True)
            pipeline.hdel(self._keys.fleet, actor_id)
            pipeline.zrem(self._keys.fleet_expiry, actor_id)
            pipeline.execute()

        self._broker.call(forget)

    def _decode(self, record: bytes) -> Heartbeat | None:
        try:
            if len(record) > MAX_HEARTBEAT_BYTES:
                raise ValueError(f"{len(record)} bytes")  # noqa: TRY301 - one way to count what we leave out
            return Heartbeat.model_validate(msgpack.unpackb(record, max_map_len=256, strict_map_key=True))
        except (ValueError, ValidationError, msgpack.UnpackException) as error:
            self.num_unreadable += 1
            logger.warning("left out an unreadable heartbeat (%d so far): %.200s", self.num_unreadable, error)
            return None
