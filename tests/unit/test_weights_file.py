import json

import numpy as np
import pytest
import safetensors
import torch
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lambdapo_async.errors import WeightsError
from lambdapo_async.weights.delta_file import make_delta, read_delta, read_full, write_full
from lambdapo_async.weights.state import State
from lambdapo_async.weights.tensor_file import BitTensor, TensorFile, compress, read_tensor_file
from lambdapo_async.weights.union import Union
from tests.reference import weights_delta as reference
from tests.weight_states import MAX_BYTES, POOL, RUN, as_reference, state_of, states, tensor_of


def old_state() -> State:
    return state_of(4, a=list(range(600)), b=tensor_of(range(50), "F32"), c=[1, 2], gone=[5])


def new_state() -> State:
    new = state_of(5, a=list(range(600)), b=tensor_of([7, *range(1, 50)], "F32"), c=[1000, 2000], d=[3])
    new.tensors["a"].bits[[0, 300, 301, 599]] += np.array([1, 500, 3, 2], np.uint16)
    return new


FILE = make_delta(old_state(), new_state(), run_id=RUN, keyframe_version=2, pool=POOL)
PAYLOAD = FILE.to_bytes()
PLAIN = zstandard.ZstdDecompressor().decompress(PAYLOAD)
FULL = write_full(new_state(), run_id=RUN, pool=POOL)
PARTS, METADATA = reference.read(PAYLOAD)


def follow(payload: bytes, state: State, *, run_id: str = RUN, version: int = 5) -> None:
    read_delta(payload, max_bytes=MAX_BYTES).apply_to(state, run_id=run_id, version=version, pool=POOL)


def refused(payload: bytes, match: str, state: State | None = None, *, run_id: str = RUN, version: int = 5) -> None:
    """It raises what ``match`` says and leaves the state alone."""
    state = old_state() if state is None else state
    before = as_reference(state), state.version
    with pytest.raises(WeightsError, match=match):
        follow(payload, state, run_id=run_id, version=version)
    assert (as_reference(state), state.version) == before


def rewritten(parts: dict[str, BitTensor] | None = None, *, drop: tuple[str, ...] = (), **metadata: str) -> bytes:
    """The delta of this module with some parts, or some words about it, replaced."""
    file = read_tensor_file(PAYLOAD, max_bytes=MAX_BYTES)
    tensors = {**file.tensors, **(parts or {})}
    return TensorFile(
        {name: tensor for name, tensor in tensors.items() if name not in drop},
        {key: value for key, value in {**file.metadata, **metadata}.items() if key not in drop},
    ).to_bytes()


def raw(header: object, data: bytes = b"") -> bytes:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + data


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


# Damage


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, len(PAYLOAD) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_of_a_delta_is_found_or_changes_no_byte(position: int, bit: int) -> None:
    damaged = bytearray(PAYLOAD)
    damaged[position] ^= 1 << bit
    state = old_state()
    try:
        follow(bytes(damaged), state)
    except WeightsError:
        assert as_reference(state) == as_reference(old_state())
    else:  # a zstd frame has a few bits that mean nothing
        assert zstandard.ZstdDecompressor().decompress(bytes(damaged)) == PLAIN
        assert as_reference(state) == as_reference(new_state())


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, len(PLAIN) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_of_a_plain_delta_is_found_or_changes_no_weight(position: int, bit: int) -> None:
    damaged = bytearray(PLAIN)
    damaged[position] ^= 1 << bit
    state = old_state()
    try:
        follow(bytes(damaged), state)
    except WeightsError:
        assert as_reference(state) == as_reference(old_state())
    else:
        assert as_reference(state) == as_reference(new_state())


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


def test_the_same_delta_is_the_same_file() -> None:
    again = make_delta(old_state(), new_state(), run_id=RUN, keyframe_version=2, pool=POOL).to_bytes()
    assert xxhash.xxh3_128_hexdigest(again) == xxhash.xxh3_128_hexdigest(PAYLOAD)
