"""The learner's hand on the fleet: which actors are set aside."""

from collections.abc import Collection
from typing import Protocol

from lambdapo_async.broker.client import Broker
from lambdapo_async.broker.replies import as_names
from lambdapo_async.broker.script import Script
from lambdapo_async.keys import RunKeys


class FleetControl(Protocol):
    """The learner's hand on the fleet. Every call but the last is fenced."""

    def quarantine(self, actor_ids: Collection[str]) -> None:
        """Refuse them leases, give those that they hold to others, and tell them with their next beat. Idempotent."""

    def readmit(self, actor_ids: Collection[str]) -> None:
        """Take them back."""

    def quarantined(self) -> frozenset[str]:
        """Who is set aside, by this learner or one before it."""


class RedisFleetControl:
    """One learner's (see ``FleetControl``)."""

    def __init__(self, broker: Broker, keys: RunKeys, fence: int) -> None:
        self._broker, self._keys, self._fence = broker, keys, fence
        self._quarantine = Script(broker, "fleet_quarantine", fenced=True)
        self._readmit = Script(broker, "fleet_readmit", fenced=True)

    def quarantine(self, actor_ids: Collection[str]) -> None:
        """Refuse them leases, give those that they hold to others, and tell them with their next beat. Idempotent."""
        keys = self._keys
        self._quarantine(
            [keys.state, keys.quarantined, keys.leases, keys.holders, keys.todo, keys.heldout],
            [self._fence, *sorted(actor_ids)],
        )

    def readmit(self, actor_ids: Collection[str]) -> None:
        """Take them back."""
        self._readmit([self._keys.state, self._keys.quarantined], [self._fence, *sorted(actor_ids)])

    def quarantined(self) -> frozenset[str]:
        """Who is set aside, by this learner or one before it."""
        return frozenset(as_names(self._broker.call(lambda client: client.smembers(self._keys.quarantined))))
