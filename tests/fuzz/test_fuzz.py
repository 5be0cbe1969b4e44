"""Readers of foreign bytes, on bytes that hypothesis makes and on good ones that were tampered with."""

import random

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lambdapo_async.errors import WeightsError
from lambdapo_async.journal.records import JournalError, decode_record
from lambdapo_async.weights.manifest import unpack_available
from tests.fuzz.targets import Target, mutated, targets

TARGETS = targets()
FEW = settings(max_examples=150, deadline=None)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_what_a_reader_is_made_for_is_read(target: Target) -> None:
    for seed in target.seeds:
        assert target.read(seed) is not None


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@given(content=st.binary(max_size=400))
@FEW
def test_any_bytes_are_read_or_refused(target: Target, content: bytes) -> None:
    target(content)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@given(number=st.integers(0, 2**32))
@FEW
def test_tampered_bytes_are_read_or_refused(target: Target, number: int) -> None:
    source = random.Random(number)
    target(mutated(source.choice(target.seeds), source))


@pytest.mark.parametrize(
    "fields",
    [
        ["group", "a.0", 1, 20, 0, 10, 0.5, ""],
        ["group", "a.0", "1", "train:0:1", 0, 10, 0.5, ""],
        ["step", 1, 0, 2, 3, []],
        ["step", 1, 0, 2, ["x"], []],
        ["step", 1, 0, 2, [1], [[2, 3]]],
        ["version", "1"],
        [],
        7,
    ],
)
def test_a_record_whose_fields_are_of_other_types_is_refused(fields: object) -> None:
    """Found by atheris: such a record came out whole, or as an AttributeError."""
    with pytest.raises(JournalError, match="a journal record"):
        decode_record(msgpack.packb(fields), b"")


@pytest.mark.parametrize("fields", [["3", 100, None, None], [3, 100, "2", None], [3, 100, None], 3])
def test_a_listed_weight_file_whose_fields_are_of_other_types_is_refused(fields: object) -> None:
    """Or sorting the list would fail in every actor."""
    with pytest.raises(WeightsError, match="is damaged"):
        unpack_available(msgpack.packb(fields))
