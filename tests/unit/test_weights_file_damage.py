"""A weight file that is damaged, of another base, or contradicts itself is refused, and the state stays as it was."""

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lambdapo_async.errors import WeightsError
from lambdapo_async.weights.delta_file import read_delta
from lambdapo_async.weights.tensor_file import BitTensor, compress
from tests.weight_deltas import METADATA, PAYLOAD, PLAIN, follow, new_state, old_state, raw, refused, rewritten
from tests.weight_states import RUN, as_reference, tensor_of


def flipped(payload: bytes, position: int, bit: int) -> bytes:
    damaged = bytearray(payload)
    damaged[position] ^= 1 << bit
    return bytes(damaged)


def is_followed(payload: bytes) -> bool:
    """Whether it led to the new state, whole; refused, it must leave the old one."""
    state = old_state()
    try:
        follow(payload, state)
    except WeightsError:
        assert as_reference(state) == as_reference(old_state())
        return False
    assert as_reference(state) == as_reference(new_state())
    return True


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, len(PAYLOAD) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_of_a_delta_is_found_or_changes_no_byte(position: int, bit: int) -> None:
    damaged = flipped(PAYLOAD, position, bit)
    if is_followed(damaged):  # a zstd frame has a few bits that mean nothing
        assert zstandard.ZstdDecompressor().decompress(damaged) == PLAIN


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, len(PLAIN) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_of_a_plain_delta_is_found_or_changes_no_weight(position: int, bit: int) -> None:
    is_followed(flipped(PLAIN, position, bit))


@settings(max_examples=50, deadline=None)
@given(length=st.integers(0, len(PAYLOAD) - 1))
def test_a_truncated_delta_is_refused(length: int) -> None:
    refused(PAYLOAD[:length], "zstd|header|cover")


@settings(max_examples=50, deadline=None)
@given(length=st.integers(0, len(PLAIN) - 1))
def test_a_truncated_plain_delta_is_refused(length: int) -> None:
    refused(PLAIN[:length], "header|cover")


@pytest.mark.parametrize("payload", [PAYLOAD + b"\0", PAYLOAD + PAYLOAD, PLAIN + b"\0"])
def test_bytes_that_belong_to_nothing_are_refused(payload: bytes) -> None:
    refused(payload, "zstd|cover")


def test_a_file_that_would_grow_beyond_its_limit_is_not_decompressed() -> None:
    with pytest.raises(WeightsError, match="at most 1000"):
        read_delta(compress(bytes(10**6)), max_bytes=1000)
    with pytest.raises(WeightsError, match="at most 1000"):
        read_delta(bytes(1001), max_bytes=1000)


@pytest.mark.parametrize(
    ("payload", "match"),
    [
        (b"", "header"),
        (b"\xff" * 8, "header"),
        (raw(b"{"), "not a safetensors header"),
        (raw(b"[" * 100_000), "not a safetensors header"),
        (raw([]), "not a JSON object"),
        (raw(b'{"a":{},"a":{}}'), "twice"),
        (raw({"__metadata__": {"version": 5}}), "not a safetensors header"),
        (raw({"a": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}, bytes(8)), "has type 'I64'"),
        (raw({"a": {"dtype": "U8", "shape": [-1], "data_offsets": [0, 1]}}, bytes(1)), "not a safetensors header"),
        (raw({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 1]}}, bytes(1)), "takes 2 bytes"),
        (raw({"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}, bytes(2)), "exactly once"),
        (raw({"a": {"dtype": "U8", "shape": [2**40], "data_offsets": [0, 2**40]}}), "exactly once"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(payload: bytes, match: str) -> None:
    refused(payload, match)


# Another base


def test_a_delta_applied_twice_is_refused() -> None:
    state = old_state()
    follow(PAYLOAD, state)
    refused(PAYLOAD, "the state is 5", state)


def test_a_delta_for_another_version_is_refused() -> None:
    state = old_state()
    state.version = 3
    refused(PAYLOAD, "changes 4, the state is 3", state)


def test_a_delta_for_the_same_version_of_another_model_is_refused() -> None:
    state = old_state()
    state.tensors["a"].bits[599] ^= 1
    refused(PAYLOAD, "was changed", state)


def test_a_base_without_the_tensors_that_do_not_change_is_refused() -> None:
    state = old_state()
    state.put("unchanged", tensor_of([1]))
    refused(PAYLOAD, "was changed", state)


@pytest.mark.parametrize(("run_id", "version"), [("run-2", 5), (RUN, 6)])
def test_a_delta_of_another_run_or_number_is_refused(run_id: str, version: int) -> None:
    refused(PAYLOAD, "expected", run_id=run_id, version=version)


# Parts that contradict each other, in files that are whole


def integers(dtype: str, *values: int) -> BitTensor:
    return BitTensor(dtype, (len(values),), np.array(values, {"U8": "u1", "I8": "i1", "I16": "i2", "U16": "u2"}[dtype]))


@pytest.mark.parametrize(
    ("payload", "match"),
    [
        (rewritten({"x::gap": integers("U8", 0), "x::step": integers("I8", 1)}), "'x' changes and is unknown"),
        (rewritten(drop=("a::gap",)), "which are no change"),
        (rewritten(drop=("a::step",)), "which are no change"),
        (rewritten({"a": tensor_of([1])}), "which are no change"),
        (rewritten({"c::exc": integers("I16", 1)}), "which are no change"),
        (rewritten({"a::val": tensor_of([1])}), "which are no change"),
        (rewritten(drop=("a::exc",)), "1 steps ask for an exception, the file has 0"),
        (rewritten({"a::exc": integers("I16", 1, 2)}), "the file has 2"),
        (rewritten({"a::gap": integers("U8", 0, 255, 43)}), "3 gaps for 6 entries"),
        (rewritten({"a::gap": integers("U8"), "a::step": integers("I8")}, drop=("a::exc",)), "both must be the same"),
        (rewritten({"a::gap": integers("U8", 0, 255, 43, 0, 255, 42)}), "last position is 600, the tensor has 600"),
        (rewritten({"a::gap": integers("U16", 0, 255, 43, 0, 255, 65_535)}), "the tensor has 600"),
        (rewritten({"b::val": tensor_of([1])}), "is F32, its new values are BF16"),
        (rewritten({"a::gap": tensor_of([0, 0, 0, 0, 0])}), "no part of a delta"),
        (rewritten({"a::step": integers("I16", 0, 0, 0, 0, 0)}), "no part of a delta"),
        (rewritten({"a::other": integers("U8", 0)}), "no part of a delta"),
        (rewritten({"a::gap": BitTensor("U8", (6, 1), np.zeros(6, np.uint8))}), "no part of a delta"),
        (rewritten({"d": integers("U8", 0)}), "'d' is U8"),
        (rewritten({"b::step": integers("I8", 1)}, drop=("b::val",)), "steps are of 16-bit patterns"),
        (rewritten(encoding="gap-abs"), "no change in a gap-abs delta"),
        (rewritten(removed='["gone", "unknown"]'), "'unknown' is removed and is unknown"),
        (rewritten(removed='["gone", "c"]'), "both changes and is removed"),
        (rewritten(removed="[]"), "would have 654 elements instead of 653"),
        (rewritten({"d": tensor_of([4])}), "nothing was changed"),
        (rewritten({"a::step": integers("I8", 1, 0, -128, 3, 0, 3)}), "nothing was changed"),
    ],
)
def test_a_delta_that_does_not_fit_is_refused_before_anything_is_written(payload: bytes, match: str) -> None:
    refused(payload, match)


@pytest.mark.parametrize(
    "payload",
    [
        rewritten(format="weights-delta/2"),
        rewritten(encoding="xor"),
        rewritten(base_version="5"),
        rewritten(base_version="-1"),
        rewritten(version="five"),
        rewritten(base_min="2"),
        rewritten(checksum="xxh3_128:12"),
        rewritten(removed="gone"),
        rewritten(removed="[1]"),
        rewritten(removed="[" * 100_000),
        rewritten(something="else"),
        *(rewritten(drop=(key,)) for key in METADATA if key != "format"),
    ],
)
def test_metadata_that_are_not_of_the_format_are_refused(payload: bytes) -> None:
    refused(payload, "are not of weights-delta/1")
