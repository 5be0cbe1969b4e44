"""What a resumed learner does again: the journal's steps behind its checkpoint, each with the same groups.

A batch is a function of the replay queue, and the queue of the order in which groups were offered, batches chosen
and versions advanced. That order is in the journal: records are numbered in order of arrival, and each step says
up to which number arrivals had been offered and what it chose. So

    checkpoint + journal -> the same batches, in the same order, however often the learner dies in between.

Steps that were journaled are trained as written; nothing is sampled and no rate limiter is asked.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lambdapo_async.journal.receipts import Receipts
from lambdapo_async.journal.records import GroupRecord, JournalError, Record, StepRecord, VersionRecord


@dataclass(frozen=True, slots=True)
class Redo:
    """Arrivals, and the step that was chosen after them."""

    arrivals: list[tuple[int, GroupRecord]]
    """(number, group) in order of arrival, discarded and held-out ones included: what the step was offered."""
    step: StepRecord | None
    """None at the end: what had arrived and was not offered yet, to be dealt with before anything new."""


def survey(records: Iterable[tuple[int, Record]], receipts: Receipts) -> int:
    """Read ahead to the journal's end, before anything is read from Redis.

    Args:
        records: all behind the checkpoint; an overlap with it is harmless.
        receipts: the checkpoint's; learns of every group.

    Returns:
        The largest policy version that any learner claimed; -1 for none.
    """
    claimed = -1
    for _, record in records:
        match record:
            case GroupRecord():
                receipts.add(record)
            case StepRecord(version=version) | VersionRecord(version=version):
                claimed = max(claimed, version)
    return claimed


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
