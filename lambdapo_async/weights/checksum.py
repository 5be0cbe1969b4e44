"""The checksum of a policy's state: the same number at the learner and at every actor that follows it."""

from collections.abc import Iterable
from dataclasses import dataclass

import xxhash

PREFIX = "xxh3_128:"


@dataclass(frozen=True, slots=True)
class TensorBytes:
    """One tensor as it lies in a safetensors file."""

    name: str
    """Hugging Face parameter name."""
    dtype: str
    """safetensors' name of the type, for example ``BF16``."""
    shape: tuple[int, ...]
    data: memoryview
    """Little-endian, row-major."""


def state_checksum(tensors: Iterable[TensorBytes]) -> str:
    """``xxh3_128:<hex>`` over names, types, shapes and bits, in the order of the names.

    Bits and not values are compared: -0.0 differs from 0.0, and NaN equals itself.
    """
    state = xxhash.xxh3_128()
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        shape = ",".join(map(str, tensor.shape))
        state.update(f"{tensor.name}\0{tensor.dtype}\0{shape}\0".encode())
        state.update(xxhash.xxh3_128_digest(tensor.data))
    return PREFIX + state.hexdigest()
