"""What is compared: our files, whole ones, and the encodings that other trainers send.

Peers are as small as they can be: no names, no checksums, the tensors in the order of the state, and zstd with our
settings, which are smaller than its own for them, too.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import zstandard
from numpy.typing import NDArray

from lambdapo_async.weights.delta_file import make_delta, read_delta, read_full, write_full
from lambdapo_async.weights.gaps import GapAbs, changed_positions, values_at
from lambdapo_async.weights.state import State
from lambdapo_async.weights.tensor_file import BitTensor, Payload, compress

RUN = "bench"
MAX_BYTES = 2**36
OURS = "gap-step + zstd (ours)"
FULL = "full safetensors"

Bits = NDArray[np.integer]


@dataclass(frozen=True)
class Encoding:
    """How a version is sent: ``encode`` from the states of two versions, ``decode`` into a mirror of the first."""

    name: str
    encode: Callable[[State, State], bytes]
    decode: Callable[[Payload, State], State]


def all_encodings(pool: Executor) -> list[Encoding]:
    def encode_delta(old: State, new: State) -> bytes:
        return make_delta(old, new, run_id=RUN, keyframe_version=0, pool=pool).to_bytes()

    def decode_delta(payload: Payload, mirror: State) -> State:
        file = read_delta(payload, max_bytes=MAX_BYTES)
        file.apply_to(mirror, run_id=RUN, version=file.metadata.version, pool=pool)
        return mirror

    def encode_full(_: State, new: State) -> bytes:
        return write_full(new, run_id=RUN, pool=pool)

    def decode_full(payload: Payload, mirror: State) -> State:
        return read_full(payload, run_id=RUN, version=mirror.version + 1, max_bytes=MAX_BYTES, pool=pool)

    return [
        Encoding(OURS, encode_delta, decode_delta),
        Encoding(FULL, encode_full, decode_full),
        Encoding("full + zstd", lambda old, new: compress(encode_full(old, new)), decode_full),
        Encoding("int32 + bf16 (TRL, vLLM, verl)", encode_int32, decode_int32),
        Encoding("gap + bf16 + zstd (PULSE)", encode_values, decode_values),
        Encoding("XOR + zstd (slime, SkyRL)", encode_xor, decode_xor),
    ]


def pairs(old: State, new: State) -> Iterator[tuple[Bits, BitTensor]]:
    return ((old.tensors[name].bits, tensor) for name, tensor in new.tensors.items())


def encode_int32(old: State, new: State) -> bytes:
    parts = []
    for before, after in pairs(old, new):
        at = np.concatenate([*changed_positions(before, after.bits), np.empty(0, np.int64)])
        parts += [at.size.to_bytes(8, "little"), at.astype(np.int32).tobytes(), after.bits[at].tobytes()]
    return b"".join(parts)


def decode_int32(payload: Payload, mirror: State) -> State:
    start = 0
    for tensor in mirror.tensors.values():
        count = int.from_bytes(payload[start : start + 8], "little")
        at = np.frombuffer(payload, np.int32, count, start + 8)
        tensor.bits[at] = np.frombuffer(payload, np.uint16, count, start + 8 + 4 * count)
        start += 8 + 6 * count
    return mirror


def encode_values(old: State, new: State) -> bytes:
    parts = []
    for before, after in pairs(old, new):
        change = values_at(changed_positions(before, after.bits), after)
        if change is None:
            parts += [bytes(9)]
        else:
            count, width = change.gap.size.to_bytes(8, "little"), bytes([change.gap.itemsize])
            parts += [count, width, change.gap.tobytes(), change.val.bits.tobytes()]
    return compress(b"".join(parts))


def decode_values(payload: Payload, mirror: State) -> State:
    plain, start = zstandard.ZstdDecompressor().decompress(payload), 0
    for tensor in mirror.tensors.values():
        count, width = int.from_bytes(plain[start : start + 8], "little"), plain[start + 8]
        if count:
            gap = np.frombuffer(plain, f"<u{width}", count, start + 9)
            values = np.frombuffer(plain, np.uint16, count, start + 9 + width * count)
            GapAbs(gap, BitTensor(tensor.dtype, (count,), values)).apply_to(tensor.bits)
        start += 9 + (width + 2) * count
    return mirror


def encode_xor(old: State, new: State) -> bytes:
    return compress(b"".join((before ^ after.bits).tobytes() for before, after in pairs(old, new)))


def decode_xor(payload: Payload, mirror: State) -> State:
    plain, start = zstandard.ZstdDecompressor().decompress(payload), 0
    for tensor in mirror.tensors.values():
        tensor.bits[...] ^= np.frombuffer(plain, np.uint16, tensor.bits.size, start)
        start += tensor.bits.nbytes
    return mirror
