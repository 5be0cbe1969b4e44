"""Journal and receipts kept in step: what is journaled counts as received, and nothing else does."""

import threading
from collections.abc import Iterable, Mapping, Sequence

from lambdapo_async.broker.interface import Descriptor, Durable
from lambdapo_async.journal.journal import Journal
from lambdapo_async.journal.receipts import Receipts, ReceiptsState
from lambdapo_async.journal.records import GroupRecord


class ReceiptBook:
    """Written by the thread that reads the queue, read by the learner's loop.

    Args:
        journal: groups go into it through this book alone.
        receipts: of everything in the journal.
    """

    def __init__(self, journal: Journal, receipts: Receipts) -> None:
        self._journal, self._receipts = journal, receipts
        self._lock = threading.Lock()

    def is_known(self, descriptor: Descriptor) -> bool:
        """Whether this very message was journaled before."""
        with self._lock:
            return self._receipts.is_known(descriptor)

    def enter(self, records: Sequence[GroupRecord]) -> list[tuple[int, GroupRecord]]:
        """Make ``records`` durable, with one fsync; (number, record as it was judged) of each.

        Raises:
            JournalError: the disk refused.
        """
        with self._lock:
            # Each is judged knowing those before it, and none counts before all are durable.
            after, judged = self._receipts.copy(), []
            for record in records:
                judged.append(after.judge(record))
                after.add(judged[-1])
            numbers = self._journal.append(judged)
            self._receipts = after
        return list(zip(numbers, judged, strict=True))

    def watermarks(self, producers: Iterable[str]) -> Mapping[str, int]:
        """producer -> last sequence number journaled, of these."""
        with self._lock:
            return {producer: self._receipts.watermark(producer) for producer in producers}

    def state(self) -> ReceiptsState:
        """For a checkpoint."""
        with self._lock:
            return self._receipts.state()

    def durable(self, *, consumed: int) -> Durable:
        """What Redis is to agree with.

        Args:
            consumed: training groups that the gate counts no more.
        """
        with self._lock:
            state, num_received = self._receipts.state(), self._receipts.num_received
        return Durable(
            watermarks=state.watermarks,
            consumed=consumed,
            waiting=num_received - consumed,
            next_index=state.next_index,
            holes=state.holes,
        )
