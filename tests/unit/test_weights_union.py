from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lambdapo_async.errors import WeightsError
from lambdapo_async.weights.delta import difference
from lambdapo_async.weights.delta_file import DeltaFile, read_delta
from lambdapo_async.weights.gaps import GapAbs
from lambdapo_async.weights.state import State
from lambdapo_async.weights.tensor_file import BitTensor
from lambdapo_async.weights.union import Union
from tests.reference import weights_delta as reference
from tests.weight_states import MAX_BYTES, POOL, RUN, as_reference, state_of, states, successors, tensor_of


def union_of(*versions: State) -> Union:
    union = Union(versions[0], POOL)
    for old, new in pairwise(versions):
        union.record(difference(old, new, POOL))
    return union


def file_of(*versions: State) -> DeltaFile:
    """As it arrives at an actor."""
    payload = union_of(*versions).file(versions[-1], run_id=RUN, pool=POOL).to_bytes()
    return read_delta(payload, max_bytes=MAX_BYTES)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_a_union_leads_from_every_version_since_the_keyframe_to_the_newest(data: st.DataObject) -> None:
    versions = [data.draw(states())]
    for _ in range(data.draw(st.integers(1, 5))):
        versions.append(data.draw(successors(versions[-1])))
    newest = versions[-1]
    file = file_of(*versions)
    for base in versions[:-1]:
        state = base.copy()
        file.apply_to(state, run_id=RUN, version=newest.version, pool=POOL)
        assert as_reference(state) == as_reference(newest)
        assert reference.apply(file.to_bytes(), as_reference(base)) == as_reference(newest)


def test_its_entries_are_those_that_changed_since_the_keyframe() -> None:
    versions = [
        state_of(1, t=[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
        state_of(2, t=[1, 2, 9, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
        state_of(3, t=[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13]),  # changed back
    ]
    change = file_of(*versions).delta.changes["t"]
    assert isinstance(change, GapAbs)
    assert (change.gap.tolist(), change.val.bits.tolist()) == ([2, 8], [3, 13])
    assert union_of(*versions).changed_share() == pytest.approx(2 / 12)
    assert file_of(*versions).delta.changed == 2


def test_fillers_of_steps_are_no_changes() -> None:
    old = np.zeros(3000, np.uint16)
    new = old.copy()
    new[[0, 1, 2, 600, 2999]] = 1
    assert union_of(state_of(1, t=old), state_of(2, t=new)).changed_share() == pytest.approx(5 / 3000)


def test_long_silence_is_bridged() -> None:
    old = np.zeros(400_001, np.uint16)
    new = old.copy()
    new[[0, 399_999, 400_000]] = 1
    base = state_of(1, t=old)
    file_of(state_of(1, t=old), state_of(2, t=new)).apply_to(base, run_id=RUN, version=2, pool=POOL)
    np.testing.assert_array_equal(base.tensors["t"].bits, new)


def test_a_tensor_changed_by_most_of_its_elements_is_whole() -> None:
    change = file_of(state_of(1, t=[0] * 8), state_of(2, t=[1] * 8)).delta.changes["t"]
    assert isinstance(change, BitTensor)
    assert change.bits.tolist() == [1] * 8


def test_a_tensor_that_left_and_came_back_is_whole() -> None:
    versions = [state_of(1, a=[1, 2, 3, 4]), state_of(2), state_of(3, a=[1, 2, 3, 5])]
    file = file_of(*versions)
    assert isinstance(file.delta.changes["a"], BitTensor)
    assert file.delta.removed == ()


def test_a_tensor_that_came_and_left_is_removed_wherever_it_is() -> None:
    versions = [state_of(1, a=[1]), state_of(2, a=[1], b=[2]), state_of(3, a=[1])]
    for base in versions[:2]:
        state = base.copy()
        file_of(*versions).apply_to(state, run_id=RUN, version=3, pool=POOL)
        assert as_reference(state) == as_reference(versions[2])


def test_what_was_removed_is_named_in_order() -> None:
    names = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    assert file_of(state_of(1, **{name: [1] for name in names}), state_of(2)).delta.removed == tuple(sorted(names))


def test_nothing_recorded_changes_nothing() -> None:
    union = union_of(state_of(1, a=[1, 2]))
    assert union.changed_share() == 0
    assert union.file(state_of(2, a=[1, 2]), run_id=RUN, pool=POOL).delta.changes == {}


def test_a_change_of_type_counts_as_wholly_changed() -> None:
    union = union_of(state_of(1, a=[1, 2], b=[1, 2]), state_of(2, a=tensor_of([1, 2], "F16"), b=[1, 2]))
    assert union.changed_share() == pytest.approx(0.5)


def test_the_changed_share_is_of_what_the_file_carries() -> None:
    base, little = state_of(1, t=[1, 2, 3, 4]), state_of(2, t=[1, 2, 3, 5])
    wholly, gone = state_of(3, t=tensor_of([1, 2, 3, 5], "F16")), state_of(3)
    assert union_of(base, little).changed_share() == 1 / 4
    assert union_of(base, little, wholly).changed_share() == 1
    assert union_of(base, little, gone).changed_share() == 0
    assert union_of(base, state_of(2, t=[1, 2, 3, 4], new=[7])).changed_share() == 0, "nothing of the keyframe"
    assert union_of(state_of(1, t=[1]), state_of(2, t=[2])).changed_share() == 1
    assert union_of(state_of(1)).changed_share() == 0


@pytest.mark.parametrize("version", [0, 3, 4])
def test_a_union_refuses_versions_it_does_not_cover(version: int) -> None:
    file = file_of(state_of(1, a=[1, 2]), state_of(2, a=[1, 3]), state_of(3, a=[2, 3]))
    with pytest.raises(WeightsError, match=r"any of \[1, 3\)"):
        file.apply_to(state_of(version, a=[1, 2]), run_id=RUN, version=3, pool=POOL)


def test_a_union_refuses_another_keyframe_and_a_wrong_version_in_between() -> None:
    file = file_of(state_of(1, a=[1, 2, 0, 0]), state_of(2, a=[1, 3, 0, 0]), state_of(3, a=[1, 4, 0, 0]))
    for base, match in ((state_of(1, a=[7, 2, 0, 0]), "was changed"), (state_of(2, a=[7, 3, 0, 0]), "nothing was")):
        before = as_reference(base)
        with pytest.raises(WeightsError, match=match):
            file.apply_to(base, run_id=RUN, version=3, pool=POOL)
        assert as_reference(base) == before


def test_a_union_applied_again_changes_nothing() -> None:
    versions = [state_of(1, a=[1, 2, 0, 0]), state_of(2, a=[1, 3, 0, 0])]
    file, state = file_of(*versions), versions[0].copy()
    file.apply_to(state, run_id=RUN, version=2, pool=POOL)
    state.version = 1
    change = file.delta.changes["a"]
    assert isinstance(change, GapAbs)
    change.apply_to(state.tensors["a"].bits)
    assert as_reference(state) == as_reference(versions[1])
