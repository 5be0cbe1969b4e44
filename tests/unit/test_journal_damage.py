"""A damaged journal: a torn tail costs what was not durable, anything else is an error with its place."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lambdapo_async.journal.journal import Journal
from lambdapo_async.journal.records import JournalError
from tests.full_disk import full_disk
from tests.journal_lives import group, only_segment, read, step, write


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


def test_a_disk_that_is_full_when_the_journal_is_taken_over_leaves_it_as_it_was(tmp_path: Path) -> None:
    write(tmp_path, 1, [group(1)])
    with full_disk(), pytest.raises(JournalError, match=r"segment-2-1 cannot be written: .*large; free disk space"):
        Journal.open(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["segment-1-1"]
    write(tmp_path, 3, [group(2)])
    assert read(tmp_path) == [group(1), group(2)]


def test_a_folder_that_cannot_be_made_is_an_error_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "journal").write_text("a file where the folder should be")
    with pytest.raises(JournalError, match=r"journal cannot be written: .*File exists"):
        Journal.open(tmp_path / "journal", 1)


@pytest.mark.parametrize("segment_bytes", [1, 1 << 20], ids=["in a new segment", "in the same one"])
def test_a_disk_that_is_full_in_the_middle_of_a_record_costs_that_record_alone(
    tmp_path: Path, segment_bytes: int
) -> None:
    journal = Journal.open(tmp_path, 1, segment_bytes=segment_bytes)
    journal.append([group(1)])
    last = max(tmp_path.iterdir())
    room = 0 if segment_bytes == 1 else last.stat().st_size + 40
    with (
        full_disk(room),
        pytest.raises(JournalError, match=r"segment-1-\d cannot be written: .*large; free disk space"),
    ):
        journal.append([group(2, bytes(500))])
    assert max(tmp_path.iterdir()) == last
    with pytest.raises(JournalError, match="failed before"):
        journal.append([group(2)])
    assert write(tmp_path, 2, [group(3)]).next_number == 2
    assert read(tmp_path) == [group(1), group(3)]
