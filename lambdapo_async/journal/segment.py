"""One append-only file of the journal, as frames that say whether they are whole.

A frame is a prefix, a header and a payload. The prefix (little-endian) holds

    magic     4 bytes
    checksum  u64     xxh3_64 of everything behind it
    header    u32     bytes of the header
    payload   u32     bytes of the payload
    offset    u64     where in the file the frame begins
    synced    u64     how much of the file was durable when the frame was written

``synced`` tells a torn tail from damage. After a crash anything behind the last fsync may be missing, in any
order, and nobody was told that it was there: it is cut. But a bad frame with a whole one somewhere behind it that
was written after the bad one had been durable is a loss, and an error with file and offset.
"""

import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import xxhash

from lambdapo_async.journal.records import MAX_HEADER_BYTES, JournalError
from lambdapo_async.wire import MAX_PAYLOAD_BYTES

_MAGIC = b"lpj1"
_PREFIX = struct.Struct("<4sQIIQQ")
_CHECKED = 4 + 8  # bytes before what the checksum covers
_SCAN_BYTES = 1024**2
_NAME = re.compile(r"segment-(\d+)-(\d+)")


@dataclass(frozen=True, slots=True, order=True)
class SegmentId:
    """Which learner wrote a segment, and the how manieth of its own it was."""

    fence: int
    n: int
    """From 1."""

    @property
    def name(self) -> str:
        """File name."""
        return f"segment-{self.fence}-{self.n}"


@dataclass(frozen=True, slots=True)
class Frame:
    """A whole frame of a segment."""

    header: bytes
    payload: bytes
    end: int
    """Offset behind it."""
    synced: int
    """Bytes of the file that were durable when it was written."""


class SegmentWriter:
    """Writes a new segment; raises ``OSError`` as the file system does."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb", buffering=0)
        self._synced = 0
        self.num_bytes = 0
        """Written so far."""

    def write(self, header: bytes, payload: bytes) -> None:
        """Append one frame; durable after :meth:`sync`."""
        fields = _PREFIX.pack(_MAGIC, 0, len(header), len(payload), self.num_bytes, self._synced)
        checksum = _checksum(fields, header, payload)
        prefix = _PREFIX.pack(_MAGIC, checksum, len(header), len(payload), self.num_bytes, self._synced)
        for part in (prefix + header, payload):
            self._write_all(memoryview(part))
        self.num_bytes += len(prefix) + len(header) + len(payload)

    def sync(self) -> None:
        """Force what was written to disk."""
        os.fsync(self._file.fileno())
        self._synced = self.num_bytes

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write_all(self, part: memoryview) -> None:
        while part:
            part = part[self._file.write(part) :]


def list_segments(folder: Path) -> list[SegmentId]:
    """The segments of a folder, in the order of their fences and numbers."""
    if not folder.is_dir():
        return []
    matches = (_NAME.fullmatch(path.name) for path in folder.iterdir())
    return sorted(SegmentId(int(match[1]), int(match[2])) for match in matches if match)


def read_frames(path: Path, *, end: int | None = None) -> Iterator[Frame]:
    """The frames of a segment, one in memory at a time.

    Args:
        path: the segment.
        end: bytes that are known to hold whole frames; None reads to the end of the file and cuts a torn tail.

    Raises:
        JournalError: something that was durable is damaged, with file and offset, or the file is gone.
    """
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size if end is None else end
        offset = 0
        while offset < size:
            frame = _read_frame(file, offset, size)
            if frame is None:
                if end is not None or _was_durable(file, offset, size):
                    raise JournalError(
                        f"{path} is damaged at offset {offset}: restore the file from a copy, or start from an "
                        "older checkpoint and journal"
                    )
                return
            yield frame
            offset = frame.end


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise JournalError(f"{path} is gone: another learner took the journal over, or somebody deleted it") from error


def _read_frame(file: BinaryIO, offset: int, size: int) -> Frame | None:
    """The frame at ``offset``; None unless it is whole and ends within ``size``."""
    file.seek(offset)
    prefix = file.read(_PREFIX.size)
    if len(prefix) < _PREFIX.size:
        return None
    magic, checksum, num_header, num_payload, own_offset, synced = _PREFIX.unpack(prefix)
    end = offset + _PREFIX.size + num_header + num_payload
    is_possible = num_header <= MAX_HEADER_BYTES and num_payload <= MAX_PAYLOAD_BYTES and end <= size
    if magic != _MAGIC or own_offset != offset or not is_possible:
        return None
    header, payload = file.read(num_header), file.read(num_payload)
    if _checksum(prefix, header, payload) != checksum:
        return None
    return Frame(header, payload, end, synced)


def _was_durable(file: BinaryIO, offset: int, size: int) -> bool:
    """Whether a whole frame behind ``offset`` was written after ``offset`` had been synced."""
    return any(
        (frame := _read_frame(file, found, size)) is not None and frame.synced > offset
        for found in _find_magic(file, offset + 1, size)
    )


def _find_magic(file: BinaryIO, start: int, size: int) -> Iterator[int]:
    """Offsets at which a frame might begin."""
    while start < size:
        file.seek(start)
        block = file.read(min(_SCAN_BYTES, size - start))
        if len(block) < len(_MAGIC):
            return
        for match in re.finditer(re.escape(_MAGIC), block):
            yield start + match.start()
        start += len(block) - (len(_MAGIC) - 1)


def _checksum(prefix: bytes, header: bytes, payload: bytes) -> int:
    state = xxhash.xxh3_64(prefix[_CHECKED:])
    state.update(header)
    state.update(payload)
    return state.intdigest()
