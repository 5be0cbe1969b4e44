"""Entries of the rollout queue, and the descriptors in them."""

from collections.abc import Mapping

from lambdapo_async.broker.interface import Descriptor
from lambdapo_async.broker.replies import as_fields
from lambdapo_async.errors import BrokerError, WireFormatError
from lambdapo_async.rollout import Lease

StreamEntry = tuple[bytes, Mapping[bytes, bytes]]
"""Stream id and fields."""


def read_entries(reply: object) -> list[StreamEntry]:
    """The entries of a stream in a reply; ``BrokerError`` if they are none."""
    match reply:
        case [*entries]:
            return [_entry(entry) for entry in entries]
    raise BrokerError(f"Redis answered {reply!r:.200} in place of a stream's entries")


def _entry(entry: object) -> StreamEntry:
    match entry:
        case (bytes() as entry_id, fields):
            return entry_id, as_fields(fields)
    raise BrokerError(f"Redis answered {entry!r:.200} in place of a stream's entry")


def read_descriptor(fields: Mapping[bytes, bytes]) -> Descriptor:
    """The descriptor in an entry's fields; ``WireFormatError`` if they are none."""
    try:
        producer, seq = _name(fields)
        return Descriptor(
            producer=producer,
            seq=seq,
            lease=Lease.from_id(fields[b"l"].decode()),
            min_version=int(fields[b"v"]),
            num_bytes=int(fields[b"n"]),
            mean_reward=float(fields[b"r"]),
        )
    except (KeyError, ValueError) as error:
        raise WireFormatError(f"an entry of the rollout queue is no descriptor: {dict(fields)!r:.200}") from error


def read_name(fields: Mapping[bytes, bytes]) -> tuple[str, int] | None:
    """Producer and sequence number, where at least they can be read."""
    try:
        return _name(fields)
    except (KeyError, ValueError):
        return None


def _name(fields: Mapping[bytes, bytes]) -> tuple[str, int]:
    producer, seq = fields[b"p"].decode(), int(fields[b"s"])
    if not producer or seq < 1:
        raise ValueError(f"{producer!r:.80} {seq}")
    return producer, seq
