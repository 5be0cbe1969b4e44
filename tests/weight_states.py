"""Random states and versions of them, for tests of the weight files."""

from concurrent.futures import Executor, Future
from math import prod
from typing import Any

import numpy as np
from hypothesis import strategies as st

from lambdapo_async.weights.state import WEIGHT_TYPES, State
from lambdapo_async.weights.tensor_file import BITS, BitTensor
from tests.reference import weights_delta as reference

RUN = "run-1"
MAX_BYTES = 2**24
SPECIAL = (0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0x7FC1, 0xFFFF, 0x7FFF, 0x8001)
"""Patterns of bfloat16: zeros of both signs, infinities, NaN with several payloads, a subnormal."""


class Here(Executor):
    """Runs everything at once in the calling thread."""

    def submit(self, work: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:  # type: ignore[override]
        future: Future[Any] = Future()
        try:
            future.set_result(work(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - what an executor does
            future.set_exception(error)
        return future


POOL = Here()


def tensor_of(values: object, dtype: str = "BF16", shape: tuple[int, ...] | None = None) -> BitTensor:
    bits = np.array(values, BITS[dtype]).reshape(-1)
    return BitTensor(dtype, (bits.size,) if shape is None else shape, bits)


def state_of(version: int = 1, **tensors: object) -> State:
    """One-dimensional bfloat16 tensors from lists of patterns."""
    return State(
        version,
        {name: each if isinstance(each, BitTensor) else tensor_of(each) for name, each in tensors.items()},
    )


def as_reference(state: State) -> reference.Tensors:
    return {name: (tensor.dtype, tensor.shape, tensor.bits.tobytes()) for name, tensor in state.tensors.items()}


shapes = st.one_of(st.just(()), st.lists(st.integers(0, 12), min_size=1, max_size=3).map(tuple), st.just((700,)))
dtypes = st.sampled_from(WEIGHT_TYPES)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def tensors(draw: st.DrawFn) -> BitTensor:
    dtype, shape = draw(dtypes), draw(shapes)
    rng = np.random.default_rng(draw(seeds))
    bits = rng.integers(0, 2 ** (8 * BITS[dtype].itemsize), prod(shape), dtype=BITS[dtype])
    return BitTensor(dtype, shape, bits)


@st.composite
def states(draw: st.DrawFn, version: int = 1) -> State:
    names = draw(st.sets(st.sampled_from(["a", "b.weight", "lm_head", "ü", "z"]), max_size=5))
    return State(version, {name: draw(tensors()) for name in sorted(names)})


@st.composite
def successors(draw: st.DrawFn, state: State) -> State:
    """The next version: every tensor unchanged, changed a little, changed wholly, removed or replaced; or a new one."""
    following: dict[str, BitTensor] = {}
    for name, tensor in state.tensors.items():
        fate = draw(st.sampled_from(["same", "steps", "steps", "leaps", "special", "all", "removed", "replaced"]))
        if fate == "replaced":
            following[name] = draw(tensors())
        elif fate != "removed":
            following[name] = changed(tensor, fate, draw(seeds))
    if draw(st.booleans()):
        following["new"] = draw(tensors())
    return State(state.version + 1, following)


def changed(tensor: BitTensor, fate: str, seed: int) -> BitTensor:
    rng = np.random.default_rng(seed)
    bits = tensor.bits.copy()
    if fate == "same" or not bits.size:
        return BitTensor(tensor.dtype, tensor.shape, bits)
    share = {"steps": 0.02, "leaps": 0.3, "special": 0.1, "all": 1.0}[fate]
    at = np.flatnonzero(rng.random(bits.size) < share)
    if fate == "special":
        bits[at] = rng.choice(np.array(SPECIAL, bits.dtype), at.size)
    else:
        reach = 3 if fate == "steps" else 2**15
        bits[at] += rng.integers(-reach, reach, at.size).astype(np.int16).astype(bits.dtype)
    return BitTensor(tensor.dtype, tensor.shape, bits)
