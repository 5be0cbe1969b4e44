import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from lambdapo_async.errors import WeightsError
from lambdapo_async.weights.checksum import TensorBytes, state_checksum
from lambdapo_async.weights.safetensors_file import encode_full, read_header, tensor_bytes, verify_payload

TENSORS = {
    "model.b.weight": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
    "model.a.weight": torch.tensor([float("nan"), -0.0, 1.0]).bfloat16(),
    "empty": torch.zeros(0, 3, dtype=torch.bfloat16),
}
PAYLOAD = encode_full(TENSORS, run_id="run-1", version=7)


def tensor(name: str, data: bytes, dtype: str = "F32", shape: tuple[int, ...] = (1,)) -> TensorBytes:
    return TensorBytes(name, dtype, shape, memoryview(data))


def test_any_safetensors_reader_gets_the_same_bits() -> None:
    loaded = load(PAYLOAD)
    assert set(loaded) == set(TENSORS)
    for name, expected in TENSORS.items():
        assert torch.equal(loaded[name].view(torch.int16), expected.view(torch.int16))


def test_metadata_are_those_of_a_full_version() -> None:
    metadata = read_header(PAYLOAD).metadata
    assert metadata["format"] == "weights-delta/1"
    assert (metadata["kind"], metadata["run_id"], metadata["version"], metadata["numel"]) == (
        "full",
        "run-1",
        "7",
        "15",
    )


def test_verify_accepts_its_own_version() -> None:
    verify_payload(PAYLOAD, run_id="run-1", version=7)


@pytest.mark.parametrize(("run_id", "version"), [("run-2", 7), ("run-1", 8)])
def test_verify_refuses_another_run_or_version(run_id: str, version: int) -> None:
    with pytest.raises(WeightsError, match="expected"):
        verify_payload(PAYLOAD, run_id=run_id, version=version)


@given(position=st.integers(0, len(PAYLOAD) - 1), bit=st.integers(0, 7))
def test_every_flipped_bit_is_found_unless_it_changes_no_meaning(position: int, bit: int) -> None:
    damaged = bytearray(PAYLOAD)
    damaged[position] ^= 1 << bit
    try:
        verify_payload(bytes(damaged), run_id="run-1", version=7)
    except WeightsError:
        return
    assert position >= 8
    assert load(bytes(damaged)).keys() == load(PAYLOAD).keys()
    header = read_header(PAYLOAD)
    assert position < header.data_start  # only metadata nobody relies on, or padding, may pass
    assert read_header(bytes(damaged)).tensors == header.tensors


@given(st.integers(0, len(PAYLOAD) - 1))
def test_truncation_is_found(length: int) -> None:
    with pytest.raises(WeightsError):
        verify_payload(PAYLOAD[:length], run_id="run-1", version=7)


def test_appended_bytes_are_found() -> None:
    with pytest.raises(WeightsError, match="exactly once"):
        verify_payload(PAYLOAD + b"\0", run_id="run-1", version=7)


@given(st.binary(max_size=200))
def test_garbage_is_a_weights_error(garbage: bytes) -> None:
    with pytest.raises(WeightsError):
        verify_payload(garbage, run_id="run-1", version=7)


def with_header(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"a": 3},
        {"a": {"dtype": "F32", "shape": [1]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**62]}},
        {"__metadata__": []},
    ],
)
def test_a_header_that_lies_is_refused(header: object) -> None:
    with pytest.raises(WeightsError):
        read_header(with_header(header, b"\0" * 4))


def test_deep_nesting_and_a_huge_header_length_are_refused() -> None:
    bomb = b"[" * 100_000
    with pytest.raises(WeightsError):
        read_header(len(bomb).to_bytes(8, "little") + bomb)
    with pytest.raises(WeightsError, match="cannot hold"):
        read_header((2**63).to_bytes(8, "little") + b"{}")


def test_missing_metadata_are_named() -> None:
    with pytest.raises(WeightsError, match="incomplete"):
        verify_payload(save(TENSORS), run_id="run-1", version=7)


def test_overlapping_tensors_are_refused() -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    with pytest.raises(WeightsError, match="exactly once"):
        read_header(with_header({"a": entry, "b": entry}, b"\0" * 4))


def test_checksum_of_the_payload_is_the_checksum_of_the_state_in_any_order() -> None:
    header = read_header(PAYLOAD)
    tensors = list(tensor_bytes(PAYLOAD, header))
    assert state_checksum(tensors) == state_checksum(reversed(tensors)) == header.metadata["checksum"]


def test_checksum_sees_name_type_shape_and_bits() -> None:
    base = tensor("a", b"\0\0\0\0")
    variants = [
        tensor("b", b"\0\0\0\0"),
        tensor("a", b"\0\0\0\0", dtype="I32"),
        tensor("a", b"\0\0\0\0", shape=(1, 1)),
        tensor("a", b"\0\0\0\x80"),
    ]
    checksums = {state_checksum([variant]) for variant in [base, *variants]}
    assert len(checksums) == 5
    assert all(checksum.startswith("xxh3_128:") for checksum in checksums)


def test_a_type_that_is_not_published_is_refused() -> None:
    with pytest.raises(WeightsError, match="int64"):
        encode_full({"a": torch.zeros(1, dtype=torch.int64)}, run_id="r", version=0)
