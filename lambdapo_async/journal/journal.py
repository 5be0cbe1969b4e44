"""The journal of a running learner: appends, makes durable, goes to the next segment, deletes old ones.

The order that makes a take-over exact:

1. win the fence where the checkpoints are;
2. raise the fence in Redis: the learner before can commit nothing any more, and what it did commit it had
   journaled before;
3. :meth:`Journal.open`: nothing that an older learner still writes counts from here on;
4. load the newest checkpoint that holds nothing beyond this history;
5. initialise the rollout source with the watermarks of checkpoint and history;
6. read, append, commit, and again.
"""

import itertools
import threading
from collections.abc import Sequence
from pathlib import Path

from lambdapo_async.durable import explaining_refusal, sync
from lambdapo_async.errors import FencedError
from lambdapo_async.fresh_listing import forget_listing
from lambdapo_async.journal.history import History, Opening
from lambdapo_async.journal.records import JournalError, Record, encode_record
from lambdapo_async.journal.segment import SegmentId, SegmentWriter, list_segments

SEGMENT_BYTES = 256 * 1024**2
"""A segment of this length or more is followed by the next one."""


class Journal:
    """Appends the records of one learner's life; any thread may. :meth:`open` makes one."""

    def __init__(self, history: History, fence: int, *, segment_bytes: int) -> None:
        self.history = history
        """What was durable when this learner took over; it does not change."""
        self._fence, self._segment_bytes = fence, segment_bytes
        self._lock = threading.Lock()
        self._next_number = history.next_number
        self._first_numbers = {link.id: link.opening.first_number for link in history.links}
        self._is_open = True
        last = history.links[-1] if history.links else None
        self._id, self._writer = self._begin(1, last.id if last else None, last.num_bytes if last else 0)

    @classmethod
    def open(cls, folder: Path, fence: int, *, segment_bytes: int = SEGMENT_BYTES) -> "Journal":
        """Take the journal over under ``fence``.

        Raises:
            FencedError: a segment of this fence or of a later one is there.
            JournalError: a segment that counts is damaged, or none can be written.
        """
        with explaining_refusal(folder, JournalError):
            folder.mkdir(parents=True, exist_ok=True)
            forget_listing(folder)
        newest = max(list_segments(folder), default=None)
        if newest is not None and newest.fence >= fence:
            raise FencedError(f"{folder} was taken over by fence {newest.fence}, this learner holds {fence}: stop it")
        history = History.find(folder)
        if history.links:  # a killed process leaves bytes in the page cache, and we are about to rely on them
            with explaining_refusal(folder / history.links[-1].id.name, JournalError):
                sync(folder / history.links[-1].id.name)
        return cls(history, fence, segment_bytes=segment_bytes)

    @property
    def next_number(self) -> int:
        """Number that the next record gets."""
        return self._next_number

    def append(self, records: Sequence[Record]) -> range:
        """Make ``records`` durable, with one fsync; returns their numbers.

        After an error nothing more can be appended: what is on disk is known only to the next learner's look.

        Raises:
            JournalError: the disk refused, or an earlier append failed.
        """
        encoded = [encode_record(record) for record in records]
        with self._lock:
            if not self._is_open:
                raise JournalError(f"{self.history.folder} is closed, or failed before: restart the learner")
            numbers = range(self._next_number, self._next_number + len(encoded))
            if encoded:
                self._write(encoded)
            self._next_number = numbers.stop
            return numbers

    def prune(self, keep_from: float) -> None:
        """Delete the segments that hold nothing from record ``keep_from`` on, and what never came to count."""
        with self._lock:
            # Oldest first: a crash in between leaves no hole in the chain.
            for segment, following in itertools.pairwise(list(self._first_numbers)):
                if self._first_numbers[following] > keep_from:
                    break
                self._path(segment).unlink(missing_ok=True)
                del self._first_numbers[segment]
            for stray in list_segments(self.history.folder):
                if stray.fence < self._fence and stray not in self._first_numbers:
                    self._path(stray).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file; everything appended is durable already."""
        with self._lock:
            self._is_open = False
            self._writer.close()

    def _write(self, encoded: Sequence[tuple[bytes, bytes]]) -> None:
        try:
            if self._writer.num_bytes >= self._segment_bytes:
                self._writer.close()
                self._id, self._writer = self._begin(self._id.n + 1, self._id, self._writer.num_bytes)
            with explaining_refusal(self._path(self._id), JournalError):
                for header, payload in encoded:
                    self._writer.write(header, payload)
                self._writer.sync()
        except JournalError:
            # Half a frame may be there, and a failed fsync may have dropped pages: only a fresh look can tell.
            self._is_open = False
            self._writer.close()
            raise

    def _begin(self, n: int, previous: SegmentId | None, previous_bytes: int) -> tuple[SegmentId, SegmentWriter]:
        """A new segment whose first frame is durable, name included; else there is none."""
        segment = SegmentId(self._fence, n)
        opening = Opening(self._next_number, previous, previous_bytes)
        with explaining_refusal(self._path(segment), JournalError):
            writer = SegmentWriter(self._path(segment))
            try:
                writer.write(opening.encode(), b"")
                writer.sync()
                sync(self.history.folder)
            except OSError:
                writer.close()
                self._path(segment).unlink(missing_ok=True)
                raise
        self._first_numbers[segment] = self._next_number
        return segment, writer

    def _path(self, segment: SegmentId) -> Path:
        return self.history.folder / segment.name
