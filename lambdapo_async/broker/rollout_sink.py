"""The actor's end of the rollout queue over Redis."""

import logging
from collections.abc import Sequence

from lambdapo_async.broker.client import Broker
from lambdapo_async.broker.interface import Delivery, Descriptor, EnqueueReply, EnqueueStatus, Marks
from lambdapo_async.broker.replies import as_number, as_text, exactly
from lambdapo_async.broker.round_trip import Argument, Command
from lambdapo_async.broker.script import Reply, Script
from lambdapo_async.errors import BrokerError
from lambdapo_async.keys import RunKeys
from lambdapo_async.seal import Seal
from lambdapo_async.wire import GROUP

logger = logging.getLogger(__name__)

ANSWERED_KEPT = 65_536
"""Answered leases remembered, to tell a late answer from a first one."""

_OFFER_EXPIRY_S = 300
"""A payload whose offer was cut off half-way goes by itself."""
_UPLOADS = 2
"""Of one offer: the first may expire on its way, or be swept by the learner."""


class RedisRolloutSink:
    """The actor's end (see ``interface.RolloutSink``); ``seal`` signs each payload, which the learner checks."""

    def __init__(self, broker: Broker, keys: RunKeys, seal: Seal) -> None:
        self._keys, self._seal = keys, seal
        self._enqueue = Script(broker, "enqueue")
        self._marks = Script(broker, "marks")

    def enqueue(self, deliveries: Sequence[Delivery], *, epoch: str) -> EnqueueReply:
        """Offer consecutive groups of one producer in one round trip (see ``interface.RolloutSink``).

        A payload travels outside the script, which would copy it, under a name of its own: it expires unless the
        script accepts it, and only then takes its number's place. So bytes that come late from a cut connection are
        never taken for the group that has their number now. A server that drops it before the script runs, or has no
        memory for one behind the first, has no room: ``FULL``. ``LATE`` does not use the number up: the next group
        takes it. Whether a lease was answered before is known for the last 65,536 answers.

        Raises:
            BrokerError: the first group alone is larger than ``broker.max_bytes``; one behind it is ``FULL``.
        """
        sealed = [(each.descriptor, self._seal.close(each.payload, purpose=GROUP)) for each in deliveries]
        for _ in range(_UPLOADS):
            status, found, committed, current_epoch = exactly(self._upload(sealed, epoch), 4)
            last = as_number(found, "last")
            refused = next((place for place, (one, _) in enumerate(sealed) if one.seq == last + 1), 0)
            if status != b"AGAIN" or refused > 0:
                break
        lease_id, num_bytes = sealed[refused][0].lease.id, len(sealed[refused][1])
        if status == b"AGAIN" and refused == 0:
            logger.warning("Redis drops the payload of group %s at once: is its policy noeviction?", lease_id)
        if status == b"TOO_BIG" and refused == 0:
            raise BrokerError(f"group {lease_id} has {num_bytes} bytes, more than all of broker.max_bytes: raise it")
        if status in (b"AGAIN", b"TOO_BIG"):
            status = b"FULL"
        return EnqueueReply(_status(status), last, as_number(committed, "committed"), as_text(current_epoch))

    def _upload(self, sealed: Sequence[tuple[Descriptor, bytes]], epoch: str) -> Reply:
        keys, producer = self._keys, sealed[0][0].producer
        uploads: list[Command] = []
        names: list[bytes] = []
        fields: list[Argument] = []
        for each, payload in sealed:
            offered = keys.offered(producer, each.seq, each.lease.id)
            uploads.append(("SET", offered, payload, "EX", _OFFER_EXPIRY_S))
            names += (keys.payload(producer, each.seq), offered)
            fields += (each.seq, each.lease.id, each.min_version, each.mean_reward, len(payload))
        _, reply = self._enqueue.after(
            uploads,
            [
                keys.state, keys.queue, keys.accepted, keys.committed, keys.leases, keys.holders, keys.todo,
                keys.heldout, keys.answered, *names,
            ],
            [epoch, producer, ANSWERED_KEPT, *fields],
        )  # fmt: skip
        return reply

    def marks(self, producer: str) -> Marks:
        """What the queue knows of a producer."""
        keys = self._keys
        reply = self._marks([keys.state, keys.accepted, keys.committed], [producer])
        status, last, committed, epoch = exactly(reply, 4)
        return Marks(status == b"OK", as_number(last, "last"), as_number(committed, "committed"), as_text(epoch))


def _status(found: object) -> EnqueueStatus:
    try:
        return EnqueueStatus(as_text(found))
    except ValueError as error:
        raise BrokerError(f"the queue answered {found!r:.80}, which this version does not know") from error
