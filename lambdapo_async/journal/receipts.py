"""Which groups the learner holds durably: the last word on what is new and what came twice.

Two facts per delivery. Its producer's sequence number says whether this very message was journaled before; its
training index says whether the prompt was answered before, by whomever. So a lease granted twice, a producer that took
a new name and an adopted spool can all bring a group again, and none of them brings it to the trainer.

Held-out leases are not in it: an evaluation takes one answer per prompt by itself.
"""

from dataclasses import replace
from typing import Final

from pydantic import BaseModel, ConfigDict, NonNegativeInt

from lambdapo_async.broker.interface import Descriptor
from lambdapo_async.journal.records import GroupRecord

DUPLICATE: Final = "duplicate"
"""Discarded because the prompt's answer is here already."""
UNLEASED: Final = "unleased"
"""Discarded because nobody can have been asked for it."""
NOT_COUNTED = (DUPLICATE, UNLEASED)
"""Discards that answer no prompt: they are neither waiting nor consumed."""
MAX_AHEAD = 2**20
"""Training indices this far beyond all others were never leased: believed, one would make a million holes."""


class ReceiptsState(BaseModel):
    """Part of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    watermarks: dict[str, NonNegativeInt] = {}
    """producer -> last sequence number journaled."""
    next_index: NonNegativeInt = 0
    """Training indices below it were leased at some time, as far as the learner knows."""
    holes: tuple[NonNegativeInt, ...] = ()
    """Indices below ``next_index`` of which no group was received, rising."""


class Receipts:
    """Learns of each group as it is journaled. Not thread-safe."""

    def __init__(self, state: ReceiptsState | None = None) -> None:
        state = state or ReceiptsState()
        self._watermarks = dict(state.watermarks)
        self._next_index, self._holes = state.next_index, set(state.holes)

    def copy(self) -> "Receipts":
        """One that learns by itself from here on."""
        copied = Receipts()
        copied._watermarks, copied._holes = dict(self._watermarks), set(self._holes)
        copied._next_index = self._next_index
        return copied

    @property
    def num_received(self) -> int:
        """Training prompts whose answer is here, trained on or not."""
        return self._next_index - len(self._holes)

    def watermark(self, producer: str) -> int:
        """Last sequence number of ``producer`` that was journaled; 0 before the first."""
        return self._watermarks.get(producer, 0)

    def is_known(self, descriptor: Descriptor) -> bool:
        """Whether this very message was journaled before."""
        return descriptor.seq <= self.watermark(descriptor.producer)

    def judge(self, record: GroupRecord) -> GroupRecord:
        """``record``, or its discard without payload where the answer is here already or was never asked for."""
        lease = record.descriptor.lease
        if lease.split != "train":
            return record
        if self._is_received(lease.index):
            return replace(record, payload=b"", discarded=DUPLICATE)
        if lease.index >= self._next_index + MAX_AHEAD:
            return replace(record, payload=b"", discarded=UNLEASED)
        return record

    def add(self, record: GroupRecord) -> None:
        """``record``, as judged, is in the journal; to hear of it again changes nothing."""
        of = record.descriptor
        # A producer's numbers are consecutive, but the queue may have set one aside that nobody could read.
        self._watermarks[of.producer] = max(of.seq, self.watermark(of.producer))
        if of.lease.split != "train" or record.discarded == UNLEASED:
            return
        self._holes.discard(of.lease.index)
        self._holes.update(range(self._next_index, of.lease.index))
        self._next_index = max(self._next_index, of.lease.index + 1)

    def state(self) -> ReceiptsState:
        """For the checkpoint, and for Redis to agree with."""
        return ReceiptsState(watermarks=self._watermarks, next_index=self._next_index, holes=tuple(sorted(self._holes)))

    def _is_received(self, index: int) -> bool:
        return index < self._next_index and index not in self._holes
