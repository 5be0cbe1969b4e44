"""Weight files: what the format says, whole versions and deltas."""

import json

import numpy as np
import pytest
import safetensors
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from lambdapo_async.errors import WeightsError
from lambdapo_async.weights.delta_file import make_delta, read_full, write_full
from lambdapo_async.weights.state import State
from lambdapo_async.weights.tensor_file import compress
from lambdapo_async.weights.union import Union
from tests.reference import weights_delta as reference
from tests.weight_deltas import (
    FILE,
    FULL,
    METADATA,
    PAYLOAD,
    PLAIN,
    follow,
    new_state,
    old_state,
    refused,
)
from tests.weight_states import MAX_BYTES, POOL, RUN, as_reference, states, tensor_of


def test_any_safetensors_reader_opens_a_delta() -> None:
    read = dict(safetensors.deserialize(PLAIN))
    assert {name: (part["dtype"], tuple(part["shape"])) for name, part in read.items()} == {
        "a::gap": ("U8", (6,)),
        "a::step": ("I8", (6,)),
        "a::exc": ("I16", (1,)),
        "b::gap": ("U8", (1,)),
        "b::val": ("F32", (1,)),
        "c": ("BF16", (2,)),
        "d": ("BF16", (1,)),
    }
    assert list(read["a::gap"]["data"]) == [0, 255, 43, 0, 255, 41]


def test_metadata_are_strings_and_those_of_the_format() -> None:
    expected = {
        "format": "weights-delta/1",
        "kind": "delta",
        "run_id": RUN,
        "version": "5",
        "base_version": "4",
        "encoding": "gap-step",
        "checksum": reference.checksum(as_reference(new_state())),
        "base_checksum": reference.checksum(as_reference(old_state())),
        "keyframe_version": "2",
        "changed": "8",
        "numel": "653",
        "removed": '["gone"]',
    }
    assert expected == METADATA


def test_a_union_file_names_the_bases_it_covers() -> None:
    union = Union(old_state(), POOL)
    union.record(FILE.delta)
    _, metadata = reference.read(union.file(new_state(), run_id=RUN, pool=POOL).to_bytes())
    assert (metadata["encoding"], metadata["base_version"], metadata["base_min"]) == ("gap-abs", "4", "4")


def test_a_delta_is_applied_whole() -> None:
    state = old_state()
    follow(PAYLOAD, state)
    assert as_reference(state) == as_reference(new_state())


def test_a_plain_delta_is_as_good_as_a_compressed_one() -> None:
    state = old_state()
    follow(PLAIN, state)
    assert as_reference(state) == as_reference(new_state())


def test_every_array_is_aligned() -> None:
    (length,) = np.frombuffer(PLAIN[:8], np.uint64)
    header = json.loads(PLAIN[8 : 8 + int(length)])
    del header["__metadata__"]
    assert all(
        (8 + int(length) + entry["data_offsets"][0]) % reference.SIZES[entry["dtype"]] == 0 for entry in header.values()
    )


@settings(max_examples=30, deadline=None)
@given(state=states())
def test_the_checksum_is_that_of_the_whole_state(state: State) -> None:
    assert state.checksum(POOL) == reference.checksum(as_reference(state))


def test_a_state_of_torch_tensors_has_their_bits() -> None:
    tensors = {
        "a": torch.tensor([[-0x8000, 0x7FC1], [0x3F80, -1]], dtype=torch.int16).view(torch.bfloat16),
        "b": torch.tensor(3.5, dtype=torch.float16),
        "c": torch.zeros(0, 2),
        "d": torch.arange(6.0).reshape(2, 3).T,
    }
    state = State.of_torch(3, tensors)
    assert state.tensors["a"].bits.tolist() == [0x8000, 0x7FC1, 0x3F80, 0xFFFF]
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in state.tensors.items()} == {
        "a": ("BF16", (2, 2)),
        "b": ("F16", ()),
        "c": ("F32", (0, 2)),
        "d": ("F32", (3, 2)),
    }
    np.testing.assert_array_equal(state.tensors["d"].bits.view(np.float32), [0, 3, 1, 4, 2, 5])


@pytest.mark.parametrize("tensor", [torch.zeros(2, dtype=torch.int8), torch.zeros(2, dtype=torch.float64)])
def test_other_types_are_no_weights(tensor: torch.Tensor) -> None:
    with pytest.raises(WeightsError, match="weights are one of"):
        State.of_torch(0, {"t": tensor})


@pytest.mark.parametrize("name", ["a::gap", "a::", "__metadata__"])
def test_names_that_a_delta_uses_itself_are_refused(name: str) -> None:
    with pytest.raises(WeightsError, match="cannot be a tensor's name"):
        State(0, {name: tensor_of([1])})


# A full version


@settings(max_examples=30, deadline=None)
@given(state=states(version=9))
def test_a_full_version_comes_back(state: State) -> None:
    payload = write_full(state, run_id=RUN, pool=POOL)
    for each in (payload, compress(payload)):
        read = read_full(each, run_id=RUN, version=9, max_bytes=MAX_BYTES, pool=POOL)
        assert as_reference(read) == as_reference(state) == reference.read(each)[0]


def test_what_is_read_can_be_followed() -> None:
    state = read_full(
        write_full(old_state(), run_id=RUN, pool=POOL), run_id=RUN, version=4, max_bytes=MAX_BYTES, pool=POOL
    )
    follow(PAYLOAD, state)
    assert as_reference(state) == as_reference(new_state())


@pytest.mark.parametrize(("run_id", "version"), [("run-2", 5), (RUN, 4)])
def test_a_full_version_of_another_run_or_number_is_refused(run_id: str, version: int) -> None:
    with pytest.raises(WeightsError, match="expected"):
        read_full(FULL, run_id=run_id, version=version, max_bytes=MAX_BYTES, pool=POOL)


def test_a_delta_is_no_full_version_and_a_full_version_no_delta() -> None:
    with pytest.raises(WeightsError, match="kind"):
        read_full(PAYLOAD, run_id=RUN, version=5, max_bytes=MAX_BYTES, pool=POOL)
    refused(FULL, "kind")


@settings(max_examples=100, deadline=None)
@given(position=st.integers(0, len(FULL) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_of_a_full_version_is_found_or_changes_no_weight(position: int, bit: int) -> None:
    damaged = bytearray(FULL)
    damaged[position] ^= 1 << bit
    try:
        state = read_full(bytes(damaged), run_id=RUN, version=5, max_bytes=MAX_BYTES, pool=POOL)
    except WeightsError:
        return
    assert as_reference(state) == as_reference(new_state())


def test_the_same_delta_is_the_same_file() -> None:
    again = make_delta(old_state(), new_state(), run_id=RUN, keyframe_version=2, pool=POOL).to_bytes()
    assert xxhash.xxh3_128_hexdigest(again) == xxhash.xxh3_128_hexdigest(PAYLOAD)
