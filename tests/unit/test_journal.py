"""The journal: what was durable is read back, whatever died while it was written."""

import tracemalloc
from pathlib import Path

import pytest

from lambdapo_async.errors import FencedError
from lambdapo_async.journal.history import History
from lambdapo_async.journal.journal import Journal
from lambdapo_async.journal.records import GroupRecord, JournalError, VersionRecord
from lambdapo_async.journal.segment import SegmentWriter
from tests.journal_lives import group, only_segment, read, step, write


def test_a_new_journal_is_empty(tmp_path: Path) -> None:
    history = write(tmp_path / "journal", 1)
    assert (history.next_number, list(history.read(1))) == (1, [])
    assert read(tmp_path / "journal") == []
    assert read(tmp_path / "nowhere") == []


def test_records_are_numbered_through_segments_and_learners(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path, 1, segment_bytes=150)
    assert journal.append([group(1), group(2)]) == range(1, 3)
    assert journal.append([]) == range(3, 3)
    assert journal.append([step(1, 2, 2, 1)]) == range(3, 4)
    journal.append([group(3)])
    journal.close()
    successor = Journal.open(tmp_path, 2)
    assert successor.next_number == 5
    assert successor.history.next_number == 5
    successor.append([VersionRecord(7)])
    successor.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["segment-1-1", "segment-1-2", "segment-2-1"]
    written = [group(1), group(2), step(1, 2, 2, 1), group(3), VersionRecord(7)]
    for first in range(1, 7):
        assert list(History.find(tmp_path).read(first)) == list(enumerate(written, 1))[first - 1 :]
    assert list(successor.history.read(4)) == [(4, group(3))]


def test_a_segment_that_never_opened_is_no_part_of_the_journal(tmp_path: Path) -> None:
    write(tmp_path, 1, [group(1)])
    (tmp_path / "segment-2-1").write_bytes(b"lpj1 half a prefix")
    (tmp_path / "segment-3-1").touch()
    history = write(tmp_path, 4, [group(2)])
    assert [link.id.name for link in history.links] == ["segment-1-1"]
    assert read(tmp_path) == [group(1), group(2)]


def test_a_woken_learner_adds_nothing_to_the_history(tmp_path: Path) -> None:
    """Frozen with an open segment; its successor takes over; it wakes, appends and even starts another segment."""
    zombie = Journal.open(tmp_path, 1, segment_bytes=300)
    zombie.append([group(1), group(2)])
    successor = Journal.open(tmp_path, 2)
    zombie.append([group(3, b"z" * 400)])
    zombie.append([group(4)])
    assert (tmp_path / "segment-1-2").exists()
    successor.append([group(3, b"successor's")])
    zombie.append([step(1, 3, 3)])
    expected = [group(1), group(2), group(3, b"successor's")]
    assert read(tmp_path) == expected
    zombie.close()
    successor.close()
    third = Journal.open(tmp_path, 3)
    assert [record for _, record in third.history.read(1)] == expected
    third.prune(1)
    third.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["segment-1-1", "segment-2-1", "segment-3-1"]


def test_a_learner_that_was_overtaken_while_it_opened_is_no_part_of_the_history(tmp_path: Path) -> None:
    """Fences 2 and 3 were both won before either opened the journal; 3 opened first."""
    write(tmp_path, 1, [group(1)])
    third = Journal.open(tmp_path, 3)
    with pytest.raises(FencedError, match="fence 3"):
        Journal.open(tmp_path, 2)
    third.append([group(2)])
    third.close()
    # 2 had looked before 3 came, and wrote its segment after 3 had sealed what it saw.
    late = SegmentWriter(tmp_path / "segment-2-1")
    late.write((tmp_path / "segment-3-1").read_bytes(), b"")
    late.sync()
    late.close()
    assert read(tmp_path) == [group(1), group(2)]
    with pytest.raises(FencedError):
        Journal.open(tmp_path, 3)


def test_a_frame_half_written_by_a_zombie_stays_outside(tmp_path: Path) -> None:
    zombie = Journal.open(tmp_path, 1)
    zombie.append([group(1)])
    end = only_segment(tmp_path).stat().st_size
    zombie.append([group(2)])
    zombie.close()
    path = tmp_path / "segment-1-1"
    whole = path.read_bytes()
    path.write_bytes(whole[: end + 10])  # the write had come this far when the successor looked
    write(tmp_path, 2, [group(2, b"again")])
    path.write_bytes(whole)  # and goes on now
    assert read(tmp_path) == [group(1), group(2, b"again")]


def test_prune_keeps_what_a_checkpoint_needs(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path, 1, segment_bytes=1)
    for seq in range(1, 6):
        journal.append([group(seq)])
    journal.prune(keep_from=3)
    assert [link.opening.first_number for link in History.find(tmp_path).links] == [3, 4, 5]
    assert read(tmp_path, 3) == [group(3), group(4), group(5)]
    with pytest.raises(JournalError, match="begins at record 3, but record 2 is needed"):
        read(tmp_path, 2)
    journal.prune(keep_from=100)  # the segment that is written to stays
    journal.append([group(6)])
    assert read(tmp_path, 5) == [group(5), group(6)]
    journal.close()
    assert write(tmp_path, 2, [group(7)]).next_number == 7
    assert read(tmp_path, 6) == [group(6), group(7)]


def test_a_learner_that_slept_is_told_that_its_successor_deleted_what_it_reads(tmp_path: Path) -> None:
    asleep = Journal.open(tmp_path, 1)
    asleep.append([group(1)])
    asleep.close()
    asleep = Journal.open(tmp_path, 2)
    successor = Journal.open(tmp_path, 3)
    successor.append([group(2)])
    successor.prune(2)
    with pytest.raises(JournalError, match="segment-1-1 is gone: another learner took the journal over"):
        list(asleep.history.read(1))
    asleep.close()
    successor.close()


def test_reading_holds_one_record_at_a_time(tmp_path: Path) -> None:
    size, count = 1 << 20, 8
    write(tmp_path, 1, *([group(seq, bytes(size))] for seq in range(1, count + 1)), segment_bytes=3 * size)
    tracemalloc.start()
    try:
        seqs = [
            record.descriptor.seq for _, record in History.find(tmp_path).read(1) if isinstance(record, GroupRecord)
        ]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert seqs == list(range(1, count + 1))
    assert peak < 4 * size
