from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lambdapo_async.errors import WeightsError
from lambdapo_async.weights.catch_up import Available, plan_catch_up
from lambdapo_async.weights.delta_file import make_delta, read_delta, read_full, write_full
from lambdapo_async.weights.state import State
from lambdapo_async.weights.tensor_file import compress
from lambdapo_async.weights.union import Union
from tests.weight_states import MAX_BYTES, POOL, RUN, as_reference, tensor_of


def full(version: int, num_bytes: int = 1000) -> Available:
    return Available(version=version, num_bytes=num_bytes)


def step(version: int, num_bytes: int = 10, base: int | None = None) -> Available:
    return Available(version=version, num_bytes=num_bytes, base_version=version - 1 if base is None else base)


def union(base_min: int, version: int, num_bytes: int = 50) -> Available:
    return Available(version=version, num_bytes=num_bytes, base_version=base_min, base_min=base_min)


STEPS = [step(version) for version in range(1, 21)]


@pytest.mark.parametrize(
    ("files", "at", "head", "expected"),
    [
        (STEPS, 5, 5, []),
        (STEPS, 17, 20, STEPS[17:]),
        ([full(0), *STEPS, union(0, 16)], 3, 18, [union(0, 16), *STEPS[16:18]]),
        ([full(0), *STEPS, union(0, 16)], 12, 18, STEPS[12:18]),
        ([full(0), *STEPS, union(0, 16)], None, 18, [full(0), union(0, 16), *STEPS[16:18]]),
        ([full(0), *STEPS[15:], union(0, 16)], 16, 20, STEPS[16:]),
        ([full(8), union(8, 16), *STEPS[16:]], 3, 18, [full(8), union(8, 16), *STEPS[16:18]]),
        ([full(18), full(20, 990)], 3, 20, [full(20, 990)]),
        ([full(8), union(8, 16)], 12, 16, [union(8, 16)]),
        ([full(2), step(9, base=2)], None, 9, [full(2), step(9, base=2)]),
        ([step(2, 5), step(3, 5), union(1, 3, 10)], 1, 3, [union(1, 3, 10)]),  # of equal bytes the fewest files
        ([full(4, 30), *STEPS], 0, 5, [full(4, 30), STEPS[4]]),
    ],
)
def test_the_plan_has_the_fewest_bytes(
    files: Sequence[Available], at: int | None, head: int, expected: list[Available]
) -> None:
    assert list(plan_catch_up(files, at=at, head=head).files) == expected


@pytest.mark.parametrize(
    ("files", "at", "head"),
    [
        ([], None, 3),
        ([], 1, 3),
        (STEPS, None, 5),
        ([full(6)], None, 5),
        ([*STEPS[:5], *STEPS[6:]], 0, 10),
        (STEPS, 0, 21),
    ],
)
def test_a_head_nothing_leads_to_is_an_error(files: Sequence[Available], at: int | None, head: int) -> None:
    with pytest.raises(WeightsError, match="nothing published leads"):
        plan_catch_up(files, at=at, head=head)


def test_a_head_before_the_mirror_is_an_error() -> None:
    with pytest.raises(WeightsError, match="older than the mirror"):
        plan_catch_up(STEPS, at=5, head=4)


def every_plan(files: Sequence[Available], at: int | None, head: int) -> Iterator[list[Available]]:
    """Every sequence of files that leads from ``at`` to ``head``, found by trying."""
    if at == head:
        yield []
    for file in files:
        base_min = file.base_version if file.base_min is None else file.base_min
        if base_min is None:
            fits = at is None
        else:
            covers_one = file.base_min is None
            fits = at is not None and base_min <= at < file.version and (at == base_min or not covers_one)
        if fits and file.version <= head:
            yield from ([file, *rest] for rest in every_plan(files, file.version, head))


@st.composite
def available(draw: st.DrawFn) -> Available:
    version, num_bytes = draw(st.integers(1, 7)), draw(st.integers(1, 30))
    kind = draw(st.sampled_from(["full", "step", "union"]))
    base = None if kind == "full" else draw(st.integers(0, version - 1))
    return Available(
        version=version, num_bytes=num_bytes, base_version=base, base_min=base if kind == "union" else None
    )


@settings(max_examples=150, deadline=None)
@given(files=st.lists(available(), max_size=10), at=st.none() | st.integers(0, 7), head=st.integers(0, 7))
def test_no_plan_is_cheaper(files: list[Available], at: int | None, head: int) -> None:
    from_scratch = list(every_plan(files, None, head))
    plans = [*from_scratch, *(every_plan(files, at, head) if at is not None else [])]
    if (at is not None and head < at) or not plans:
        with pytest.raises(WeightsError):
            plan_catch_up(files, at=at, head=head)
        return
    found = plan_catch_up(files, at=at, head=head)
    assert list(found.files) in plans
    assert found.num_bytes == min(sum(file.num_bytes for file in plan) for plan in plans)


@dataclass
class Shelf:
    """What a learner has published and not yet deleted."""

    payloads: dict[Available, bytes] = field(default_factory=dict)

    def put(self, payload: bytes, version: int, base: int | None = None, base_min: int | None = None) -> None:
        file = Available(version=version, num_bytes=len(payload), base_version=base, base_min=base_min)
        self.payloads[file] = payload


class Reader:
    """An actor's mirror, and the bytes it pulled."""

    def __init__(self) -> None:
        self.state: State | None = None
        self.pulled = 0

    def catch_up(self, shelf: Shelf, head: int) -> None:
        plan = plan_catch_up(shelf.payloads, at=None if self.state is None else self.state.version, head=head)
        for file in plan.files:
            payload = shelf.payloads[file]
            self.pulled += len(payload)
            if file.base_version is None:
                self.state = read_full(payload, run_id=RUN, version=file.version, max_bytes=MAX_BYTES, pool=POOL)
            else:
                assert self.state is not None
                delta = read_delta(payload, max_bytes=MAX_BYTES)
                delta.apply_to(self.state, run_id=RUN, version=file.version, pool=POOL)


def test_forty_versions_with_a_skipper_a_sleeper_a_late_joiner_and_a_flipped_bit() -> None:
    rng = np.random.default_rng(3)
    state = State(0, {name: tensor_of(rng.integers(0, 2**16, 4000)) for name in ("a", "b", "c")})
    shelf, changes = Shelf(), Union(state, POOL)
    shelf.put(compress(write_full(state, run_id=RUN, pool=POOL)), 0)
    follower, skipper, sleeper, unlucky, late = (Reader() for _ in range(5))
    for version in range(1, 41):
        old = state
        state = State(version, {name: stepped(tensor.bits, rng) for name, tensor in old.tensors.items()})
        file = make_delta(old, state, run_id=RUN, keyframe_version=0, pool=POOL)
        changes.record(file.delta)
        shelf.put(file.to_bytes(), version, old.version)
        if version % 8 == 0:  # the union replaces the one before and all steps it covers
            shelf.payloads = {file: data for file, data in shelf.payloads.items() if file.base_version is None}
            shelf.put(changes.file(state, run_id=RUN, pool=POOL).to_bytes(), version, 0, 0)
        follower.catch_up(shelf, version)
        if version % 5 == 0:
            skipper.catch_up(shelf, version)
        if version in (1, 40):
            sleeper.catch_up(shelf, version)
        if version != 23:
            unlucky.catch_up(shelf, version)
        else:
            fail_on_a_flipped_bit(unlucky, shelf, version)
    late.catch_up(shelf, 40)
    assert sleeper.pulled < follower.pulled
    for reader in (follower, skipper, sleeper, unlucky, late):
        assert reader.state is not None
        assert (reader.state.version, as_reference(reader.state)) == (40, as_reference(state))


def stepped(bits: np.ndarray, rng: np.random.Generator) -> object:
    return tensor_of(bits + rng.choice(np.array([0, 1, 2**16 - 1], np.uint16), bits.size, p=[0.99, 0.005, 0.005]))


def fail_on_a_flipped_bit(reader: Reader, shelf: Shelf, version: int) -> None:
    """The failed update is not swallowed: the mirror stays what it was, and can go on from there or start anew."""
    assert reader.state is not None
    before = as_reference(reader.state), reader.state.version
    damaged = Shelf({file: data[:-9] + bytes([data[-9] ^ 16]) + data[-8:] for file, data in shelf.payloads.items()})
    with pytest.raises(WeightsError):
        reader.catch_up(damaged, version)
    assert (as_reference(reader.state), reader.state.version) == before
    reader.state = None
