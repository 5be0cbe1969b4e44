"""What a resumed learner does again: the journal's steps behind its checkpoint, each with the same groups.

A batch is a function of the replay queue, and the queue of the order in which groups were offered, batches chosen
and versions advanced. That order is in the journal: records are numbered in order of arrival, and each step says
up to which number arrivals had been offered and what it chose. So

    checkpoint + journal -> the same batches, in the same order, however often the learner dies in between.

Steps that were journaled are trained as written; nothing is sampled and no rate limiter is asked.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from lambdapo_async.journal.records import GroupRecord, JournalError, Record, StepRecord, VersionRecord


@dataclass(frozen=True, slots=True)
class Redo:
    """Arrivals, and the step that was chosen after them."""

    arrivals: list[tuple[int, GroupRecord]]
    """(number, group) in order of arrival, discarded and held-out ones included: what the step was offered."""
    step: StepRecord | None
    """None at the end: what had arrived and was not offered yet, to be dealt with before anything new."""


@dataclass(slots=True)
class Marks:
    """What a resumed learner must know of the whole journal before it reads a group from Redis."""

    watermarks: dict[str, int]
    """producer -> last sequence number that is durable here."""
    version: int = -1
    """Largest version that any learner claimed."""
    next_index: int = 0
    """Training indices below it were leased."""
    num_waiting: int = 0
    """Training groups behind what the checkpoint had taken: admitted, in Redis no more, and not consumed yet."""


def survey(records: Iterable[tuple[int, Record]], *, watermarks: Mapping[str, int], taken: int) -> Marks:
    """Read ahead to the journal's end.

    Args:
        records: from ``taken + 1`` on, or earlier: marks only rise, so an overlap with the checkpoint is harmless.
        watermarks: the checkpoint's.
        taken: number of the last record that the checkpoint had taken.
    """
    marks = Marks(dict(watermarks))
    for number, record in records:
        match record:
            case GroupRecord(descriptor=of):
                marks.watermarks[of.producer] = max(marks.watermarks.get(of.producer, 0), of.seq)
                if of.lease.split == "train":
                    marks.next_index = max(marks.next_index, of.lease.index + 1)
                    marks.num_waiting += number > taken
            case StepRecord(version=version) | VersionRecord(version=version):
                marks.version = max(marks.version, version)
    return marks


def redo(records: Iterable[tuple[int, Record]], *, taken: int, step: int) -> Iterator[Redo]:
    """The journaled steps behind a checkpoint; in memory are only the arrivals of one step and those ahead of it.

    Args:
        records: from ``taken + 1`` on, or earlier.
        taken: number of the last record that the checkpoint had taken.
        step: steps that the checkpoint has trained.

    Raises:
        JournalError: a step is missing between checkpoint and journal, or in the journal.
    """
    waiting: deque[tuple[int, GroupRecord]] = deque()
    for number, record in records:
        if isinstance(record, GroupRecord) and number > taken:
            waiting.append((number, record))
        elif isinstance(record, StepRecord) and record.step > step:
            if record.step != step + 1:
                raise JournalError(f"record {number} is step {record.step}, but step {step + 1} comes next")
            step = record.step
            yield Redo(_up_to(record.taken, waiting), record)
    yield Redo(list(waiting), None)


def _up_to(number: int, waiting: deque[tuple[int, GroupRecord]]) -> list[tuple[int, GroupRecord]]:
    arrivals = []
    while waiting and waiting[0][0] <= number:
        arrivals.append(waiting.popleft())
    return arrivals
