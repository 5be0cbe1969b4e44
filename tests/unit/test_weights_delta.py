from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lambdapo_async.errors import WeightsError
from lambdapo_async.weights.adapter import PREFIX
from lambdapo_async.weights.delta import apply, difference
from lambdapo_async.weights.delta_file import DeltaFile, make_delta, read_delta
from lambdapo_async.weights.gaps import GapAbs, GapStep, positions
from lambdapo_async.weights.state import State
from lambdapo_async.weights.tensor_file import BitTensor
from tests.reference import weights_delta as reference
from tests.weight_states import MAX_BYTES, POOL, RUN, SPECIAL, as_reference, state_of, states, successors, tensor_of


def delta_of(old: State, new: State) -> DeltaFile:
    """As it arrives at an actor."""
    file = make_delta(old, new, run_id=RUN, keyframe_version=0, pool=POOL)
    return read_delta(file.to_bytes(), max_bytes=MAX_BYTES)


def followed(old: State, new: State) -> State:
    """``old`` after the delta to ``new``."""
    state = old.copy()
    delta_of(old, new).apply_to(state, run_id=RUN, version=new.version, pool=POOL)
    return state


def gaps_of(old: object, new: object) -> GapStep:
    change = difference(state_of(1, t=old), state_of(2, t=new), POOL).changes["t"]
    assert isinstance(change, GapStep)
    return change


def with_changes(numel: int, at: list[int], by: int = 1) -> tuple[np.ndarray, np.ndarray]:
    old = np.arange(numel).astype(np.uint16)
    new = old.copy()
    new[at] += np.uint16(by)
    return old, new


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_delta_leads_to_the_same_bits_here_and_in_the_reference(data: st.DataObject) -> None:
    old = data.draw(states())
    new = data.draw(successors(old))
    file = make_delta(old, new, run_id=RUN, keyframe_version=0, pool=POOL)
    state = followed(old, new)
    assert as_reference(state) == as_reference(new)
    assert state.version == new.version
    assert reference.apply(file.to_bytes(), as_reference(old)) == as_reference(new)


def test_every_pattern_becomes_every_kind_of_pattern() -> None:
    old = np.arange(2**16).astype(np.uint16)
    for new in (old[::-1].copy(), np.roll(old, 1), np.roll(old, 127), np.roll(old, 128), np.roll(old, 129)):
        state = followed(state_of(1, t=old), state_of(2, t=new))
        np.testing.assert_array_equal(state.tensors["t"].bits, new)


@pytest.mark.parametrize("old", SPECIAL)
def test_zeros_and_nan_are_compared_as_bits(old: int) -> None:
    before, after = state_of(1, t=[old] * len(SPECIAL)), state_of(2, t=list(SPECIAL))
    delta = difference(before, after, POOL)
    assert delta.changed == len(SPECIAL) - 1
    np.testing.assert_array_equal(followed(before, after).tensors["t"].bits, SPECIAL)


@pytest.mark.parametrize("distance", [1, 255, 256, 257, 512, 513, 65_535, 65_536, 65_537, 131_072, 131_073, 200_000])
@pytest.mark.parametrize("first", [0, 1, 255, 256, 65_536])
def test_gaps_of_every_length_are_bridged(first: int, distance: int) -> None:
    at = [first, first + distance]
    old, new = with_changes(first + distance + 1, at)
    change = gaps_of(old, new)
    assert np.concatenate(list(change.changed_positions())).tolist() == at
    file = make_delta(state_of(1, t=old), state_of(2, t=new), run_id=RUN, keyframe_version=0, pool=POOL)
    assert reference.apply(file.to_bytes(), as_reference(state_of(1, t=old))) == as_reference(state_of(2, t=new))
    np.testing.assert_array_equal(followed(state_of(1, t=old), state_of(2, t=new)).tensors["t"].bits, new)


def test_fillers_are_the_largest_gap_with_step_0() -> None:
    change = gaps_of(*with_changes(1000, [1, 2, 600, 601]))
    assert change.gap.dtype == np.uint8
    assert change.gap.tolist() == [1, 0, 255, 255, 85, 0]
    assert change.step.tolist() == [1, 1, 0, 0, 1, 1]


def test_rare_changes_take_wide_gaps() -> None:
    change = gaps_of(*with_changes(140_000, [10, 20_000, 139_999]))
    assert change.gap.dtype == np.uint16
    assert change.gap.tolist() == [10, 19_989, 65_535, 54_462]
    assert list(change.step) == [1, 1, 0, 1]
    narrow, wide = (gaps_of(*with_changes(1000, at)).gap for at in ([10, 20, 321, 622], [10, 311, 612, 913]))
    assert (narrow.dtype, narrow.size) == (np.uint8, 6), "12 bytes with fillers and steps, as many as wide"
    assert (wide.dtype, wide.size) == (np.uint16, 4), "12 bytes, narrow 14"


def test_only_steps_that_int8_cannot_hold_are_exceptions() -> None:
    steps = [127, -127, 128, -128, -129, 32_767, -32_768]
    old = np.full(40, 5, np.uint16)
    new = old.copy()
    new[: len(steps)] += np.array(steps, np.int16).view(np.uint16)
    change = gaps_of(old, new)
    assert change.step.tolist() == [127, -127, -128, -128, -128, -128, -128]
    assert change.exc.tolist() == [128, -128, -129, 32_767, -32_768]


def test_changes_at_the_borders_of_blocks() -> None:
    numel = 3 * 2**19 + 5
    at = [0, 2**19 - 1, 2**19, 2**20 - 1, 2**20, 3 * 2**19 - 1, 3 * 2**19, numel - 1]
    old, new = with_changes(numel, at)
    assert np.concatenate(list(gaps_of(old, new).changed_positions())).tolist() == at
    np.testing.assert_array_equal(followed(state_of(1, t=old), state_of(2, t=new)).tensors["t"].bits, new)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_more_entries_than_fit_in_a_block(dtype: str) -> None:
    """20,000 neighbours, then 1,000 that only fillers reach; many are exceptions. Forth and back."""
    rng, at = np.random.default_rng(0), np.cumsum([1] * 20_000 + [300] * 1000)
    old = tensor_of(rng.integers(0, 2**15, at[-1] + 1), dtype)
    new = tensor_of(old.bits, dtype)
    new.bits[at] += rng.integers(1, 400, at.size).astype(new.bits.dtype)
    change = difference(state_of(1, t=old), state_of(2, t=new), POOL).changes["t"]
    assert isinstance(change, GapStep if dtype == "BF16" else GapAbs)
    found = np.concatenate(list(change.changed_positions())).tolist()
    assert found == at.tolist() if dtype == "BF16" else set(found) > set(at.tolist())
    bits = old.bits.copy()
    undo = change.apply_to(bits)
    np.testing.assert_array_equal(bits, new.bits)
    undo.apply_to(bits)
    np.testing.assert_array_equal(bits, old.bits)


def test_positions_are_the_cumulated_gaps() -> None:
    gap = np.array([0, 3, 255, 0, 7], np.uint8)
    assert np.concatenate(list(positions(gap))).tolist() == [0, 4, 260, 261, 269]


def test_float32_changes_are_values() -> None:
    old = tensor_of(range(400), "F32")
    new = tensor_of([*range(300), 7, 8, 9, 10, 11, *range(305, 400)], "F32")
    delta = difference(state_of(1, t=old), state_of(2, t=new), POOL)
    change = delta.changes["t"]
    assert isinstance(change, GapAbs)
    assert (change.gap.tolist(), change.val.bits.tolist(), change.val.dtype) == (
        [255, 44, 0, 0, 0, 0],
        [255, 7, 8, 9, 10, 11],
        "F32",
    )
    assert delta.changed == 5


def test_a_tensor_changed_wholly_is_replaced_only_where_that_is_smaller() -> None:
    old = np.zeros(100, np.uint16)
    by_one, one_exception = old + 1, old + 1
    one_exception[7] = 1000
    assert isinstance(difference(state_of(1, t=old), state_of(2, t=by_one), POOL).changes["t"], GapStep), "200 bytes"
    assert isinstance(difference(state_of(1, t=old), state_of(2, t=one_exception), POOL).changes["t"], BitTensor)
    zeros, ones = (tensor_of(bits, "F32") for bits in (old, by_one))
    assert isinstance(difference(state_of(1, t=zeros), state_of(2, t=ones), POOL).changes["t"], BitTensor), "500 bytes"


def test_an_adapter_goes_whole_however_little_of_it_changed() -> None:
    name = f"{PREFIX}layers.0.q_proj.lora_A.weight"
    old, new = np.zeros(100, np.uint16), np.zeros(100, np.uint16)
    new[7] = 1
    before, after = ({name: tensor_of(bits), "base": tensor_of(bits)} for bits in (old, new))
    changes = difference(State(1, before), State(2, after), POOL).changes
    assert isinstance(changes[name], BitTensor)
    assert isinstance(changes["base"], GapStep)


def test_a_state_keeps_no_array_of_the_delta() -> None:
    old, new = state_of(1), state_of(2, t=[1, 2])
    delta = difference(old, new, POOL)
    apply(delta, old, version=2, checksum=new.checksum(POOL), pool=POOL)
    old.tensors["t"].bits[0] = 9
    change = delta.changes["t"]
    assert isinstance(change, BitTensor)
    assert change.bits.tolist() == [1, 2]


@pytest.mark.parametrize(
    "after", [tensor_of([1, 2, 3, 4], "F16"), tensor_of([1, 2, 3, 4], shape=(2, 2)), tensor_of([1, 2, 3])]
)
def test_another_type_or_shape_is_replaced_whole(after: BitTensor) -> None:
    old, new = state_of(1, t=[1, 2, 3, 4]), state_of(2, t=after)
    assert difference(old, new, POOL).changes == {"t": after}
    assert as_reference(followed(old, new)) == as_reference(new)


def test_nothing_changed_is_an_empty_delta() -> None:
    old, new = state_of(1, a=[1, 2], b=[]), state_of(2, a=[1, 2], b=[])
    delta = difference(old, new, POOL)
    assert (delta.changes, delta.removed, delta.changed) == ({}, (), 0)
    assert followed(old, new).checksum(POOL) == new.checksum(POOL)


def test_what_was_removed_is_named_in_order() -> None:
    """Else the file of the same two states would be another one in every process."""
    names = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    delta = difference(state_of(1, **{name: [1] for name in names}), state_of(2), POOL)
    assert delta.removed == tuple(sorted(names))


def test_scalars_and_empty_tensors() -> None:
    old = state_of(1, scalar=tensor_of([7], shape=()), empty=tensor_of([], shape=(0, 4)), gone=tensor_of([], "F32"))
    new = state_of(2, scalar=tensor_of([8], shape=()), empty=tensor_of([], shape=(0, 4)), new=tensor_of([], shape=(0,)))
    delta = difference(old, new, POOL)
    assert (set(delta.changes), delta.removed, delta.changed) == ({"scalar", "new"}, ("gone",), 1)
    assert as_reference(followed(old, new)) == as_reference(new)


def test_a_result_with_another_checksum_is_undone_bit_by_bit() -> None:
    old = state_of(1, a=[1, 2, 3], wide=[0, 5, 0], whole=[1, 2], gone=[9], f=tensor_of(range(50), "F32"))
    new = state_of(2, a=[1, 3, 3], wide=[0, 4000, 0], whole=[700, 800], new=[3], f=tensor_of([*range(49), 5000], "F32"))
    before, checksum = as_reference(old), old.checksum(POOL)
    with pytest.raises(WeightsError, match="nothing was changed"):
        apply(difference(old, new, POOL), old, version=2, checksum=checksum, pool=POOL)
    assert (as_reference(old), old.version, old.checksum(POOL)) == (before, 1, checksum)
    assert State(1, old.tensors).checksum(POOL) == checksum, "no digest is stale"


def test_threads_make_the_same_file_and_the_same_state() -> None:
    rng = np.random.default_rng(0)
    old = State(1, {f"t{index}": tensor_of(rng.integers(0, 2**16, 5000)) for index in range(20)})
    new = State(2, {name: tensor_of(tensor.bits + (rng.random(5000) < 0.01)) for name, tensor in old.tensors.items()})
    alone = make_delta(old, new, run_id=RUN, keyframe_version=0, pool=POOL)
    with ThreadPoolExecutor(4) as pool:
        together = make_delta(old.copy(), new.copy(), run_id=RUN, keyframe_version=0, pool=pool)
        assert together.to_bytes() == alone.to_bytes()
        together.apply_to(old, run_id=RUN, version=2, pool=pool)
    assert as_reference(old) == as_reference(new)


def test_the_digest_of_an_unchanged_tensor_is_not_computed_again() -> None:
    old, new = state_of(1, t=[1, 2]), state_of(2, t=[1, 2])
    digest = old.digest("t")
    difference(old, new, POOL)
    new.tensors["t"].bits[0] = 9  # behind its back: only a digest that was taken over stays the same
    assert new.digest("t") == digest
