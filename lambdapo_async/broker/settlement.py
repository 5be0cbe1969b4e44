"""Makes what Redis holds of a run agree with what its learner holds: at a start, and after Redis lost anything."""

import logging
from collections.abc import Iterator, Mapping, Sequence

import redis

from lambdapo_async.broker.client import Broker
from lambdapo_async.broker.descriptors import StreamEntry, read_descriptor, read_entries
from lambdapo_async.broker.interface import Descriptor, Durable
from lambdapo_async.broker.limits import RunLimits
from lambdapo_async.broker.ownership import Ownership
from lambdapo_async.broker.replies import as_names, as_number, exactly
from lambdapo_async.broker.round_trip import Argument
from lambdapo_async.broker.script import Script
from lambdapo_async.errors import WireFormatError
from lambdapo_async.keys import RunKeys

logger = logging.getLogger(__name__)

_AT_ONCE = 1024
_CLOSED: Mapping[str, Argument] = {"server": ""}


class Settlement:
    """The steps of ``RolloutSource.initialise``.

    The queue is closed first, so that nobody leases or offers until it is opened again: no step can race an actor,
    and a learner that dies in between leaves a closed queue to the next one. Every step may be repeated.
    """

    def __init__(self, broker: Broker, keys: RunKeys, ownership: Ownership, fence: int, limits: RunLimits) -> None:
        self._broker, self._keys, self._ownership = broker, keys, ownership
        self._fence, self._limits = fence, limits
        self._set_marks = Script(broker, "set_marks", fenced=True)
        self._recount = Script(broker, "recount", fenced=True)
        self._open = Script(broker, "open", fenced=True)

    def settle(self, durable: Durable) -> int:
        """Returns the queue's ticks: what a later call must find or exceed.

        Raises:
            FencedError: another learner owns the run.
        """
        keys, limits = self._keys, self._limits
        fields = {
            "capacity": limits.capacity,
            "max_groups": limits.max_groups,
            "max_bytes": limits.max_bytes,
            "group_bytes": limits.group_bytes,
            "lease_ms": int(limits.lease_s * 1000),
        }
        self._ownership.take_over(self._fence, {**fields, **_CLOSED})
        accepted = self._sort_out(durable.watermarks)
        marks = [
            argument
            for producer, last in accepted.items()
            for argument in (producer, last, durable.watermarks.get(producer, 0))
        ]
        self._set_marks([keys.state, keys.accepted, keys.committed], [self._fence, *marks])
        self._recount(
            [keys.state, keys.queue, keys.leases, keys.holders, keys.todo, keys.heldout, keys.answered],
            [self._fence, durable.consumed, durable.waiting, durable.next_index, *durable.holes],
        )
        _, ticks = exactly(self._open([keys.state], [self._fence]), 2)
        return as_number(ticks, "ticks")

    def _sort_out(self, watermarks: Mapping[str, int]) -> dict[str, int]:
        """Keep entries that follow their producer's mark without a gap and have their payload; delete all others.

        What is deleted is durable already, or its actor offers it again. Returns producer -> last number kept.
        """
        accepted = dict.fromkeys(self._producers(), 0) | dict(watermarks)
        kept, dropped = set[bytes](), list[bytes]()
        for entries in self._stream():
            described = [_describe(entry) for entry in entries]
            for (entry_id, _), one, is_whole in zip(entries, described, self._are_whole(described), strict=True):
                if one is not None and is_whole and one.seq == accepted.get(one.producer, 0) + 1:
                    accepted[one.producer] = one.seq
                    kept.add(self._keys.payload(one.producer, one.seq))
                else:
                    dropped.append(entry_id)
        self._delete_entries(dropped)
        num_payloads = self._delete_payloads(kept)
        logger.info(
            "the queue holds %d groups; %d entries and %d payloads were durable or useless",
            len(kept), len(dropped), num_payloads,
        )  # fmt: skip
        return accepted

    def _producers(self) -> list[str]:
        names = as_names(self._broker.call(lambda client: client.hkeys(self._keys.accepted)))
        return [name for name in names if name]

    def _stream(self) -> Iterator[list[StreamEntry]]:
        start = b"-"
        while entries := self._range(start):
            yield entries
            start = b"(" + entries[-1][0]

    def _range(self, start: bytes) -> list[StreamEntry]:
        return read_entries(
            self._broker.call(lambda client: client.xrange(self._keys.queue, start, "+", count=_AT_ONCE))
        )

    def _are_whole(self, described: list[Descriptor | None]) -> list[bool]:
        """Whether each one's payload is there in its full length."""

        def measure(client: redis.Redis) -> list[object]:
            pipeline = client.pipeline(transaction=False)
            for one in described:
                if one is not None:
                    pipeline.strlen(self._keys.payload(one.producer, one.seq))
            return pipeline.execute()

        lengths = iter(self._broker.call(measure))
        return [one is not None and next(lengths) == one.num_bytes for one in described]

    def _delete_entries(self, entry_ids: Sequence[bytes]) -> None:
        def delete(client: redis.Redis) -> None:
            for first in range(0, len(entry_ids), _AT_ONCE):
                client.xdel(self._keys.queue, *entry_ids[first : first + _AT_ONCE])

        self._broker.call(delete)

    def _delete_payloads(self, kept: set[bytes]) -> int:
        """Delete the payloads that no entry names; an offer that is on its way repeats its own."""

        def sweep(client: redis.Redis) -> int:
            count = 0
            for name in client.scan_iter(match=self._keys.all_payloads, count=_AT_ONCE):
                if name not in kept:
                    count += client.unlink(name)
            return count

        num_deleted: int = self._broker.call(sweep)
        return num_deleted


def _describe(entry: StreamEntry) -> Descriptor | None:
    try:
        return read_descriptor(entry[1])
    except WireFormatError as error:
        logger.warning("deleted a stream entry: %s", error)
        return None
