"""Which bytes of which segments are the run's history: a chain that is read back from its newest segment.

Every segment opens with a frame that names the segment before it, how many bytes of that one count, and the number
of its own first record. So what a learner appends after its successor opened a segment (a process that was
frozen and woke up) lies behind the length that counts, or in a segment that no other names, and is never read.

No segment is changed after its learner is gone: a torn tail is cut by the length, not from the file.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgpack

from lambdapo_async.journal.records import JournalError, Record, decode_record
from lambdapo_async.journal.segment import Frame, SegmentId, list_segments, read_frames

JOURNAL_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Opening:
    """First frame of a segment; it holds no record and has no number."""

    first_number: int
    """Number of the segment's first record."""
    previous: SegmentId | None
    """The segment before; None in the run's first one."""
    previous_bytes: int
    """How much of ``previous`` counts."""

    def encode(self) -> bytes:
        """The frame's header."""
        before = None if self.previous is None else [self.previous.fence, self.previous.n]
        header: bytes = msgpack.packb(["open", JOURNAL_SCHEMA, self.first_number, before, self.previous_bytes])
        return header


@dataclass(frozen=True, slots=True)
class Link:
    """A segment, as far as it counts."""

    id: SegmentId
    opening: Opening
    num_bytes: int
    num_records: int

    @property
    def next_number(self) -> int:
        """Number of the first record behind it."""
        return self.opening.first_number + self.num_records


@dataclass(frozen=True, slots=True)
class History:
    """Everything that was durable in a journal when it was looked at."""

    folder: Path
    links: tuple[Link, ...]
    """Oldest first, without a hole."""

    @classmethod
    def find(cls, folder: Path) -> "History":
        """The chain that ends in the newest segment; empty for a new run.

        Raises:
            JournalError: a segment that counts is damaged.
        """
        newest = next(_opened_newest_first(folder), None)
        if newest is None:
            return cls(folder, ())
        links = [newest]
        while (link := _link_before(folder, links[0])) is not None:
            links.insert(0, link)
        return cls(folder, tuple(links))

    @property
    def first_number(self) -> int:
        """Number of the oldest record that is still there."""
        return self.links[0].opening.first_number if self.links else 1

    @property
    def next_number(self) -> int:
        """Number of the first record behind the history."""
        return self.links[-1].next_number if self.links else 1

    def end_of(self, fence: int) -> int:
        """Number of the first record behind what the learners up to ``fence`` wrote of it."""
        behind = (link.opening.first_number for link in self.links if link.id.fence > fence)
        return next(behind, self.next_number)

    def read(self, first: int) -> Iterator[tuple[int, Record]]:
        """(number, record) from ``first`` on, one in memory at a time.

        Raises:
            JournalError: a record that must be there was deleted or is damaged.
        """
        if first < self.first_number:
            raise JournalError(
                f"{self.folder} begins at record {self.first_number}, but record {first} is needed: older segments "
                "were deleted; restore them, or start from a newer checkpoint"
            )
        for link in self.links:
            if link.next_number > first:
                yield from self._read_link(link, first)

    def _read_link(self, link: Link, first: int) -> Iterator[tuple[int, Record]]:
        path = self.folder / link.id.name
        number = link.opening.first_number - 1
        for position, frame in enumerate(read_frames(path, end=link.num_bytes)):
            number = link.opening.first_number + position - 1
            if position > 0 and number >= first:
                yield number, decode_record(frame.header, frame.payload)
        if number + 1 != link.next_number:
            raise JournalError(f"{path} ends at record {number}, but {link.next_number - 1} was written: it was cut")


def _opened_newest_first(folder: Path) -> Iterator[Link]:
    """Segments with a whole first frame, up to their torn tails; without that frame a segment was never used."""
    for segment in reversed(list_segments(folder)):
        path = folder / segment.name
        frames = read_frames(path)
        first = next(frames, None)
        if first is not None:
            num_records, end = 0, first.end
            for frame in frames:
                num_records, end = num_records + 1, frame.end
            yield Link(segment, _decode_opening(path, first), end, num_records)


def _link_before(folder: Path, link: Link) -> Link | None:
    """The segment that ``link`` names; None when there is none or it was deleted."""
    segment = link.opening.previous
    if segment is None or not (path := folder / segment.name).exists():
        return None
    frame = next(read_frames(path, end=link.opening.previous_bytes), None)
    if frame is None:
        raise JournalError(f"{path} is empty, but {link.id.name} goes on from it")
    opening = _decode_opening(path, frame)
    return Link(segment, opening, link.opening.previous_bytes, link.opening.first_number - opening.first_number)


def _decode_opening(path: Path, frame: Frame) -> Opening:
    try:
        kind, schema, first_number, before, previous_bytes = msgpack.unpackb(frame.header, use_list=False)
        if (kind, schema) != ("open", JOURNAL_SCHEMA):
            raise JournalError(f"{path} is a journal of schema {schema!r:.40}, this version reads {JOURNAL_SCHEMA}")
        return Opening(first_number, None if before is None else SegmentId(*before), previous_bytes)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise JournalError(f"{path} does not open as a journal segment: {error!s:.200}") from error
