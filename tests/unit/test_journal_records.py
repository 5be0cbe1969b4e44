"""A journal's records: each comes back as it was, and what they say about the run is found again."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lambdapo_async.broker.interface import Descriptor
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
from lambdapo_async.rollout import Lease
from tests.journal_lives import group, step

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
