"""Leases over Redis: the gate stands in the server, so that no two actors can pass it at once."""

import uuid
from collections.abc import Sequence

from lambdapo_async.broker.client import Broker
from lambdapo_async.broker.replies import as_text
from lambdapo_async.broker.script import Script
from lambdapo_async.keys import RunKeys
from lambdapo_async.rollout import Lease


class RedisAdmission:
    """One actor's leases (see ``interface.Admission``).

    A lost reply loses nothing: the repeated call carries the same request id and is answered with the same leases; if
    it never comes, they expire like those of a dead actor.
    """

    def __init__(self, broker: Broker, keys: RunKeys, actor_id: str) -> None:
        self._keys, self._actor_id = keys, actor_id
        self._lease = Script(broker, "lease")
        self._renew = Script(broker, "renew")
        self._hand_back = Script(broker, "hand_back")

    def lease(self, max_count: int) -> tuple[Lease, ...]:
        """At most ``max_count`` leases: held-out ones first, then returned ones, then new ones."""
        keys = self._keys
        return _leases(
            self._lease(
                [
                    keys.state, keys.leases, keys.holders, keys.todo, keys.heldout, keys.grant(self._actor_id),
                    keys.answered,
                ],
                [self._actor_id, max_count, uuid.uuid4().hex, keys.quarantined],
            )
        )  # fmt: skip

    def renew(self, leases: Sequence[Lease]) -> tuple[Lease, ...]:
        """Push the expiry of held leases; returns those that are no longer ours."""
        keys = self._keys
        return _leases(
            self._renew([keys.state, keys.leases, keys.holders], [self._actor_id, *(lease.id for lease in leases)])
        )

    def hand_back(self, leases: Sequence[Lease]) -> None:
        """Give leases up unanswered; they are granted next, in this order."""
        keys = self._keys
        self._hand_back(
            [keys.state, keys.leases, keys.holders, keys.todo, keys.heldout],
            [self._actor_id, *(lease.id for lease in leases)],
        )


def _leases(reply: Sequence[object]) -> tuple[Lease, ...]:
    return tuple(Lease.from_id(as_text(lease_id)) for lease_id in reply)
