"""A policy's weights as bits, and the checksum that is the same number at the learner and at every actor."""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from typing import TypeVar

import torch
import xxhash
from torch import Tensor

from lambdapo_async.errors import WeightsError
from lambdapo_async.weights.tensor_file import BITS, BitTensor

CHECKSUM_PREFIX = "xxh3_128:"
WEIGHT_TYPES = ("BF16", "F16", "F32")
"""The types that weights may have."""
MAX_NUMEL = 2**32 - 1
"""Elements of one tensor: distances between changes are held in 32 bits while they are collected."""
SEPARATOR = "::"
"""Parts a tensor's name from what a delta says of it (``T::gap``), so no tensor's own name may hold it."""

_TORCH_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_TORCH_BITS = {2: torch.int16, 4: torch.int32}

R = TypeVar("R")


class State:
    """Every tensor of one version by Hugging Face name, with the digest of each cached until it changes.

    Whoever writes into a tensor's bits calls ``forget_digest``. Not thread-safe, except for different names.
    """

    def __init__(self, version: int, tensors: Mapping[str, BitTensor]) -> None:
        """Takes the tensors as they are, without copying.

        Raises:
            WeightsError: a type that is not floating point, or a name that a delta could not tell from its own.
        """
        self.version = version
        self._tensors = dict[str, BitTensor]()
        self._digests = dict[str, bytes]()
        for name, tensor in tensors.items():
            self.put(name, tensor)

    @classmethod
    def of_torch(cls, version: int, tensors: Mapping[str, Tensor]) -> "State":
        """The bits of CPU tensors; contiguous ones are shared, not copied, and must not be trained on meanwhile."""
        return cls(version, {name: _bits_of(name, tensor) for name, tensor in tensors.items()})

    @property
    def tensors(self) -> Mapping[str, BitTensor]:
        """Every tensor by name; change it through ``put`` and ``remove`` only."""
        return self._tensors

    @property
    def numel(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.bits.size for tensor in self._tensors.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.bits.nbytes for tensor in self._tensors.values())

    def copy(self) -> "State":
        """The same version in memory of its own, writable."""
        copied = State(self.version, {name: tensor.copy() for name, tensor in self._tensors.items()})
        copied._digests.update(self._digests)
        return copied

    def put(self, name: str, tensor: BitTensor) -> None:
        """Add or replace one tensor."""
        if tensor.dtype not in WEIGHT_TYPES:
            raise WeightsError(f"{name!r:.200} is {tensor.dtype}; weights are one of {', '.join(WEIGHT_TYPES)}")
        if SEPARATOR in name or name == "__metadata__":
            raise WeightsError(f"{name!r:.200} cannot be a tensor's name: deltas use {SEPARATOR!r} for their own")
        if tensor.bits.size > MAX_NUMEL:
            raise WeightsError(f"{name!r:.200} has {tensor.bits.size} elements, at most {MAX_NUMEL} are possible")
        self._tensors[name] = tensor
        self.forget_digest(name)

    def remove(self, name: str) -> None:
        """Drop one tensor; fine if there is none."""
        self._tensors.pop(name, None)
        self.forget_digest(name)

    def forget_digest(self, name: str) -> None:
        """Its bits were written to."""
        self._digests.pop(name, None)

    def digest(self, name: str) -> bytes:
        """xxh3_128 of one tensor's bytes, computed at most once."""
        if name not in self._digests:
            self._digests[name] = xxhash.xxh3_128_digest(self._tensors[name].bits.data)
        return self._digests[name]

    def adopt_digest(self, name: str, other: "State") -> None:
        """Take the digest of the same bits in ``other``, if it is known there."""
        if name in other._digests:
            self._digests[name] = other._digests[name]

    def checksum(self, pool: Executor) -> str:
        """``xxh3_128:<hex>`` over names, types, shapes and digests in the order of the names.

        Each tensor adds ``name\\0dtype\\0shape\\0`` (shape as ``2,3``; UTF-8) and the xxh3_128 of its bytes.
        """
        unknown = self._tensors.keys() - self._digests.keys()  # a thread per known one would cost more than it knows
        for_each(self.digest, self.largest_first(unknown), pool)
        state = xxhash.xxh3_128()
        for name in sorted(self._tensors):
            tensor = self._tensors[name]
            shape = ",".join(map(str, tensor.shape))
            state.update(f"{name}\0{tensor.dtype}\0{shape}\0".encode())
            state.update(self.digest(name))
        return CHECKSUM_PREFIX + state.hexdigest()

    def largest_first(self, names: Iterable[str]) -> list[str]:
        """The order in which threads should take tensors, so that none begins with the largest at the end."""
        sizes = {name: tensor.bits.nbytes for name, tensor in self._tensors.items()}
        return sorted(names, key=lambda name: sizes.get(name, 0), reverse=True)


def for_each(work: Callable[[str], R], names: Iterable[str], pool: Executor) -> dict[str, R]:
    """``work`` of every name, in parallel; the first error is raised when all have ended."""
    futures = {name: pool.submit(work, name) for name in names}
    errors = [error for future in futures.values() if (error := future.exception()) is not None]
    if errors:
        raise errors[0]
    return {name: future.result() for name, future in futures.items()}


def _bits_of(name: str, tensor: Tensor) -> BitTensor:
    if tensor.dtype not in _TORCH_NAMES:
        raise WeightsError(f"{name} is {tensor.dtype}; weights are one of {', '.join(WEIGHT_TYPES)}")
    dtype = _TORCH_NAMES[tensor.dtype]
    signed = tensor.detach().flatten().view(_TORCH_BITS[tensor.dtype.itemsize]).numpy()
    return BitTensor(dtype, tuple(tensor.shape), signed.view(BITS[dtype]))
