"""One delta and the states on both sides of it, whole and rewritten."""

import json

import numpy as np
import pytest
import zstandard

from lambdapo_async.errors import WeightsError
from lambdapo_async.weights.delta_file import make_delta, read_delta, write_full
from lambdapo_async.weights.state import State
from lambdapo_async.weights.tensor_file import BitTensor, TensorFile, read_tensor_file
from tests.reference import weights_delta as reference
from tests.weight_states import MAX_BYTES, POOL, RUN, as_reference, state_of, tensor_of


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
