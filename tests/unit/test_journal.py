"""The journal: what was durable is read back, whatever died while it was written."""

import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lambdapo_async.broker.interface import Descriptor
from lambdapo_async.errors import FencedError
from lambdapo_async.journal.history import History
from lambdapo_async.journal.journal import Journal
from lambdapo_async.journal.receipts import Receipts, ReceiptsState
from lambdapo_async.journal.records import (
    GroupRecord,
    JournalError,
    Record,
    StepRecord,
    VersionRecord,
    decode_record,
    encode_record,
)
from lambdapo_async.journal.redo import redo, survey
from lambdapo_async.journal.segment import SegmentWriter
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


RECORDS = st.one_of(
    st.builds(
        GroupRecord,
        st.builds(
            Descriptor,
            st.text(max_size=20),
            st.integers(1, 2**60),
            st.builds(Lease, st.sampled_from(["train", "heldout"]), st.integers(0, 2**40), st.integers(0, 2**31)),
            st.integers(0, 2**40),
            st.integers(0, 2**40),
            st.floats(allow_nan=False),
        ),
        st.binary(max_size=50),
        st.text(max_size=10),
    ),
    st.builds(
        StepRecord,
        st.integers(1, 2**40),
        st.integers(0, 2**40),
        st.integers(0, 2**60),
        st.lists(st.integers(1, 2**60), max_size=5).map(tuple),
        st.lists(st.tuples(st.integers(1, 2**60), st.text(max_size=5)), max_size=3).map(tuple),
    ),
    st.builds(VersionRecord, st.integers(0, 2**60)),
)


@settings(max_examples=100, deadline=None)
@given(RECORDS)
def test_a_record_comes_back_as_it_was(record: Record) -> None:
    assert decode_record(*encode_record(record)) == record


@pytest.mark.parametrize("header", [b"", b"\xc1", b"\x91\xa5group", b"\x92\xa7version", b"\x92\xa4song\x01", b"\x01"])
def test_an_unknown_record_is_an_error(header: bytes) -> None:
    with pytest.raises(JournalError):
        decode_record(header, b"")


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


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_tail_torn_anywhere_costs_only_what_was_not_durable(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("journal")
    batches = [[group(1), group(2)], [group(3, b"x" * 200)], [group(4), step(1, 4, 1)]]
    journal = Journal.open(folder, 1)
    ends, counts = [only_segment(folder).stat().st_size], [0]
    for batch in batches:
        journal.append(batch)
        ends.append(only_segment(folder).stat().st_size)
        counts.append(counts[-1] + len(batch))
    journal.close()
    cut = data.draw(st.integers(ends[0], ends[-1]), label="bytes left")
    durable = max(count for end, count in zip(ends, counts, strict=True) if end <= cut)
    with only_segment(folder).open("r+b") as file:
        file.truncate(cut)
        if data.draw(st.booleans(), label="garbage follows"):  # the length was durable, the pages were not
            file.seek(cut)
            file.write(bytes(data.draw(st.integers(0, 300), label="zeros")))
    written = [record for batch in batches for record in batch]
    found = read(folder)
    assert len(found) >= durable
    assert found == written[: len(found)]
    history = write(folder, 2, [group(9)])
    assert history.next_number == len(found) + 1
    assert read(folder) == [*found, group(9)]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damage_before_the_last_batch_is_an_error_with_its_place(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("journal")
    journal = Journal.open(folder, 1)
    journal.append([group(1), group(2)])
    durable = only_segment(folder).stat().st_size
    journal.append([group(3)])
    journal.close()
    content = bytearray(only_segment(folder).read_bytes())
    content[data.draw(st.integers(0, durable - 1), label="at")] ^= 1 << data.draw(st.integers(0, 7), label="bit")
    only_segment(folder).write_bytes(content)
    with pytest.raises(JournalError, match=r"segment-1-1 is damaged at offset \d+"):
        read(folder)
    with pytest.raises(JournalError, match="damaged"):
        Journal.open(folder, 2)


def test_pages_lost_in_any_order_from_the_last_batch_are_a_torn_tail(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path, 1)
    journal.append([group(1)])
    durable = only_segment(tmp_path).stat().st_size
    journal.append([group(2), group(3)])
    journal.close()
    content = bytearray(only_segment(tmp_path).read_bytes())
    content[durable : durable + 40] = bytes(40)  # the second batch's first page never came to disk, its next one did
    only_segment(tmp_path).write_bytes(content)
    assert read(tmp_path) == [group(1)]


def test_damage_in_a_followed_segment_is_an_error_even_at_its_end(tmp_path: Path) -> None:
    write(tmp_path, 1, [group(1)], [group(2)])
    write(tmp_path, 2, [group(3)])
    path = tmp_path / "segment-1-1"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(JournalError, match="segment-1-1 is damaged at offset"):
        read(tmp_path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(JournalError, match="segment-1-1 is damaged at offset"):
        read(tmp_path)


def test_a_payload_that_looks_like_frames_is_only_a_payload(tmp_path: Path) -> None:
    write(tmp_path / "other", 1, *([group(seq, bytes(300))] for seq in range(1, 4)))
    forged = only_segment(tmp_path / "other").read_bytes()  # whole frames that claim to follow durable bytes
    folder = tmp_path / "journal"
    write(folder, 1, [group(1)])
    write(folder, 2, [group(2, forged + b"end")])
    assert read(folder) == [group(1), group(2, forged + b"end")]
    path = folder / "segment-2-1"
    path.write_bytes(path.read_bytes()[:-1])  # the tail is torn behind them
    assert read(folder) == [group(1)]


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


def test_a_lost_segment_is_noticed(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path, 1, segment_bytes=1)
    for seq in range(1, 5):
        journal.append([group(seq)])
    journal.close()
    (tmp_path / "segment-1-3").unlink()
    with pytest.raises(JournalError, match="record 2 is needed"):
        read(tmp_path, 2)


def test_nothing_is_appended_after_the_disk_refused(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path, 1, segment_bytes=1)
    journal.append([group(1)])
    (tmp_path / "segment-1-3").mkdir()  # the next segment cannot be made
    with pytest.raises(JournalError, match="cannot be written"):
        journal.append([group(2)])
    (tmp_path / "segment-1-3").rmdir()
    with pytest.raises(JournalError, match="failed before"):
        journal.append([group(2)])
    assert read(tmp_path) == [group(1)]


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


def test_survey_raises_marks() -> None:
    records: list[tuple[int, Record]] = [
        (4, group(7)),
        (5, group(1, producer="b")),
        (6, step(3, 5, 4)),
        (7, group(8)),
        (8, VersionRecord(40)),
        (9, group(2, producer="b", split="heldout")),
    ]
    receipts = Receipts(ReceiptsState(watermarks={"a": 7, "c": 9}, next_index=8, holes=(1,)))
    assert survey(records, receipts) == 40
    assert receipts.state() == ReceiptsState(watermarks={"a": 8, "b": 2, "c": 9}, next_index=9, holes=())


def test_redo_gives_each_step_what_it_was_offered() -> None:
    records: list[tuple[int, Record]] = list(
        enumerate([group(1), group(2), group(3), step(1, 2, 1), group(4), step(2, 3, 2), step(3, 5, 3), group(5)], 1)
    )
    parts = list(redo(records, taken=0, step=0))
    assert [[number for number, _ in part.arrivals] for part in parts] == [[1, 2], [3], [5], [8]]
    assert [part.step.step if part.step else None for part in parts] == [1, 2, 3, None]
    (second, third, rest) = redo(records, taken=2, step=1)
    assert [number for number, _ in second.arrivals] == [3]
    assert (third.step, rest.step) == (step(3, 5, 3), None)
    with pytest.raises(JournalError, match="record 6 is step 2, but step 1 comes next"):
        list(redo(records[4:], taken=0, step=0))
