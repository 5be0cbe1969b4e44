"""Forty small versions, and a store in memory that holds them as a learner would publish them."""

import json
from itertools import pairwise

import numpy as np

from lambdapo_async.errors import WeightsGoneError
from lambdapo_async.weights.catch_up import Available
from lambdapo_async.weights.delta_file import make_delta, write_full
from lambdapo_async.weights.manifest import NewFile
from lambdapo_async.weights.state import State
from lambdapo_async.weights.tensor_file import BitTensor, compress
from lambdapo_async.weights.union import Union
from tests.weight_states import POOL, RUN, tensor_of

NAMES = ("model.embed_tokens.weight", "model.layers.0.mlp.weight", "model.layers.1.mlp.weight", "lm_head.weight")


class MemoryStore:
    """``history.WeightFiles``"""

    def __init__(self) -> None:
        self.payloads: dict[Available, bytes] = {}

    def add(self, *files: NewFile) -> None:
        self.payloads.update({file.available: file.payload for file in files})

    def head(self) -> int | None:
        return max((file.version for file in self.payloads), default=None)

    def files(self) -> tuple[Available, ...]:
        return tuple(sorted(self.payloads, key=lambda file: (file.version, file.num_bytes)))

    def fetch(self, file: Available) -> bytes:
        if file not in self.payloads:
            raise WeightsGoneError(f"version {file.version} is gone")
        return self.payloads[file]

    def corrupt(self, file: Available) -> None:
        """Another payload, whole in itself, that does not lead where it says."""
        payload = bytearray(self.payloads[file])
        payload[len(payload) // 2] ^= 1
        self.payloads[file] = bytes(payload)


def full_file(state: State, *, run_id: str = RUN) -> NewFile:
    payload = compress(write_full(state, run_id=run_id, pool=POOL))
    return NewFile(Available(version=state.version, num_bytes=len(payload)), payload)


def step_file(old: State, new: State, *, run_id: str = RUN) -> NewFile:
    payload = make_delta(old, new, run_id=run_id, keyframe_version=0, pool=POOL).to_bytes()
    return NewFile(Available(version=new.version, num_bytes=len(payload), base_version=old.version), payload)


def versions(count: int) -> list[State]:
    """Layer 1 changes in one element per version, the head in all of them."""
    rng = np.random.default_rng(0)
    states = [State(0, {name: tensor_of(rng.integers(0x3C00, 0x3E00, 400), shape=(20, 20)) for name in NAMES})]
    while len(states) < count:
        following = states[-1].copy()
        following.version += 1
        _add_one(following, NAMES[2], following.version % 400)
        _add_one(following, NAMES[3], slice(None))
        states.append(following)
    return states


def _add_one(state: State, name: str, at: int | slice) -> None:
    bits = state.tensors[name].bits.copy()
    bits[at] += 1
    state.put(name, BitTensor("BF16", state.tensors[name].shape, bits))


def published(states: list[State], *, run_id: str = RUN, union_every: int = 3) -> list[list[NewFile]]:
    """The files of each version: a keyframe, a step each, and unions."""
    union = Union(states[0], POOL)
    files = [[full_file(states[0], run_id=run_id)]]
    for old, new in pairwise(states):
        delta = make_delta(old, new, run_id=run_id, keyframe_version=0, pool=POOL)
        union.record(delta.delta)
        files.append([step_file(old, new, run_id=run_id)])
        if new.version % union_every == 0:
            payload = union.file(new, run_id=run_id, pool=POOL).to_bytes()
            lead = Available(version=new.version, num_bytes=len(payload), base_version=0, base_min=0)
            files[-1].append(NewFile(lead, payload))
    return files


MODEL_FILES = {
    "config.json": json.dumps({"model_type": "qwen3", "torch_dtype": "float32"}).encode(),
    "tokenizer.json": b"t",
}
