"""What the journal holds, and how a record is written: a msgpack header and, for a group, its payload.

Records are numbered from 1 through the whole history of a run, over all segments and incarnations; the number
is a group's name in the replay queue and in a checkpoint.
"""

from dataclasses import dataclass

import msgpack

from lambdapo_async.broker.interface import Descriptor
from lambdapo_async.errors import LambdaPOError, WireFormatError
from lambdapo_async.rollout import Lease

MAX_HEADER_BYTES = 16 * 1024**2
"""A step's record names every group of its batch; far more than any needs."""


class JournalError(LambdaPOError):
    """The journal is damaged, incomplete, or cannot be written."""


@dataclass(frozen=True, slots=True)
class GroupRecord:
    """One delivery of the rollout queue, in order of arrival."""

    descriptor: Descriptor
    payload: bytes
    """As it came; may be empty when ``discarded`` says that nobody will read it."""
    discarded: str = ""
    """Why nothing will be trained on it (``malformed``, ``zero_variance``): decided once, on arrival, so that a
    restarted learner decides the same. Empty when it is good."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A batch, written before it is trained on: the step happens exactly so, however often the learner dies."""

    step: int
    """Number of the step that trains it, from 1."""
    version: int
    """Policy version that the step starts from: what staleness was measured against."""
    taken: int
    """Record number up to which arrivals had been offered to the replay queue when the batch was chosen."""
    chosen: tuple[int, ...]
    """Record numbers of the batch's groups, in order."""
    dropped: tuple[tuple[int, str], ...] = ()
    """(record number, reason) of what left the queue since the step before."""


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """A policy version, claimed before it is published: no later learner gives the number to other weights."""

    version: int


Record = GroupRecord | StepRecord | VersionRecord


def encode_record(record: Record) -> tuple[bytes, bytes]:
    """(header, payload); ``JournalError`` for a header that no reader would accept."""
    header: bytes
    match record:
        case GroupRecord(descriptor=of, payload=payload, discarded=discarded):
            fields = [of.producer, of.seq, of.lease.id, of.min_version, of.num_bytes, of.mean_reward, discarded]
            header = msgpack.packb(["group", *fields])
        case StepRecord():
            payload = b""
            fields = [record.step, record.version, record.taken, record.chosen, record.dropped]
            header = msgpack.packb(["step", *fields])
        case VersionRecord():
            header, payload = msgpack.packb(["version", record.version]), b""
    if len(header) > MAX_HEADER_BYTES:
        raise JournalError(f"a record's header has {len(header)} bytes, at most {MAX_HEADER_BYTES} are read back")
    return header, payload


def decode_record(header: bytes, payload: bytes) -> Record:
    """Inverse of :func:`encode_record`; ``JournalError`` for a record of another schema."""
    try:
        fields = msgpack.unpackb(header, use_list=False)
        record = _record(fields, payload)
    except (ValueError, TypeError, WireFormatError, msgpack.UnpackException) as error:
        raise JournalError(f"a journal record cannot be understood: {error!s:.200}") from error
    if record is None:
        raise JournalError(
            f"a journal record is of an unknown kind: {fields!r:.80}; was it written by a newer version?"
        )
    return record


def _record(fields: object, payload: bytes) -> Record | None:
    """None for what no version of ours has written."""
    match fields:
        case ["group", str(producer), int(seq), str(lease), int(min_version), int(size), float(reward), str(discarded)]:
            descriptor = Descriptor(producer, seq, Lease.from_id(lease), min_version, size, reward)
            return GroupRecord(descriptor, payload, discarded)
        case ["step", int(step), int(version), int(taken), tuple(chosen), tuple(dropped)]:
            is_plain = all(isinstance(number, int) for number in chosen) and all(map(_is_drop, dropped))
            return StepRecord(step, version, taken, chosen, dropped) if is_plain else None
        case ["version", int(version)]:
            return VersionRecord(version)
    return None


def _is_drop(dropped: object) -> bool:
    match dropped:
        case [int(_), str(_)]:
            return True
    return False
