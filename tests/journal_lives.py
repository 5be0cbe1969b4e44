"""Journals that one learner after the other writes, and what is read from them."""

from collections.abc import Sequence
from pathlib import Path

from lambdapo_async.broker.interface import Descriptor
from lambdapo_async.journal.history import History
from lambdapo_async.journal.journal import Journal
from lambdapo_async.journal.records import GroupRecord, Record, StepRecord
from lambdapo_async.rollout import Lease


def group(
    seq: int, payload: bytes = b"payload", *, producer: str = "a", split: str = "train", discarded: str = ""
) -> GroupRecord:
    lease = Lease("train", seq) if split == "train" else Lease("heldout", seq, 3)
    return GroupRecord(Descriptor(producer, seq, lease, 2, len(payload), 0.5), payload, discarded)


def step(number: int, taken: int, *chosen: int) -> StepRecord:
    return StepRecord(number, number + 10, taken, chosen, ((1, "stale"),))


def read(folder: Path, first: int = 1) -> list[Record]:
    return [record for _, record in History.find(folder).read(first)]


def write(folder: Path, fence: int, *batches: Sequence[Record], segment_bytes: int = 1 << 20) -> History:
    """One learner's life; returns what it found."""
    journal = Journal.open(folder, fence, segment_bytes=segment_bytes)
    for batch in batches:
        journal.append(batch)
    journal.close()
    return journal.history


def only_segment(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path
