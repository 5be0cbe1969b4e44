"""A weight version as plain safetensors bytes: written whole by the learner, verified whole by an actor.

Layout (any safetensors reader opens it): uint64 little-endian header length, JSON header, tensor data.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, TypeAdapter, ValidationError
from safetensors.torch import save
from torch import Tensor

from lambdapo_async.errors import WeightsError
from lambdapo_async.weights.checksum import TensorBytes, state_checksum

FORMAT = "weights-delta/1"
MAX_HEADER_BYTES = 64 * 2**20
"""A header larger than this is an attack or damage: 100,000 tensors need about 12 MiB."""

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_FIELDS = TypeAdapter(dict[str, dict[str, object]])
_METADATA = TypeAdapter(dict[str, str])
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class TensorEntry(BaseModel):
    """One tensor of a header."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    dtype: str
    shape: Annotated[list[NonNegativeInt], Field(max_length=8)]
    data_offsets: Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)]
    """[begin, end) in bytes, from the end of the header."""


class FullMetadata(BaseModel):
    """What a full version says of itself; all values are strings in the file."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: str
    kind: str
    run_id: str
    version: int
    checksum: str
    """``xxh3_128:<hex>`` of the state the file holds."""


@dataclass(frozen=True, slots=True)
class Header:
    """A validated header: every tensor lies inside the payload, and no byte belongs to none or to two."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    data_start: int
    """Offset of the tensor data in the payload."""


def encode_full(tensors: Mapping[str, Tensor], *, run_id: str, version: int) -> bytes:
    """The payload of version ``version``: CPU tensors by Hugging Face name, contiguous."""
    metadata = {
        "format": FORMAT,
        "kind": "full",
        "run_id": run_id,
        "version": str(version),
        "keyframe_version": str(version),
        "numel": str(sum(tensor.numel() for tensor in tensors.values())),
        "checksum": state_checksum(_bytes_of(name, tensor) for name, tensor in tensors.items()),
    }
    payload: bytes = save(dict(tensors), metadata)
    return payload


def _bytes_of(name: str, tensor: Tensor) -> TensorBytes:
    if tensor.dtype not in _DTYPE_NAMES:
        raise WeightsError(f"{name} is {tensor.dtype}; weights are published as one of {sorted(_DTYPES)}")
    bits: NDArray[np.uint8] = tensor.flatten().view(torch.uint8).numpy()
    return TensorBytes(name, _DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), bits.data)


def read_header(payload: bytes) -> Header:
    """Parse and validate the header; ``WeightsError`` for anything that is not one whole safetensors file."""
    length = int.from_bytes(payload[:8], "little")
    if len(payload) < 8 or length > min(MAX_HEADER_BYTES, len(payload) - 8):
        raise WeightsError(f"{len(payload)} bytes cannot hold a safetensors header of {length}")
    try:
        fields = _FIELDS.validate_python(json.loads(payload[8 : 8 + length]))
        metadata = _METADATA.validate_python(fields.pop("__metadata__", {}))
        tensors = {name: TensorEntry.model_validate(entry) for name, entry in fields.items()}
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"not a safetensors header: {error!s:.200}") from error
    _check_extents(tensors, num_bytes=len(payload) - 8 - length)
    return Header(tensors, metadata, 8 + length)


def _check_extents(tensors: Mapping[str, TensorEntry], *, num_bytes: int) -> None:
    for name, entry in tensors.items():
        begin, end = entry.data_offsets
        if entry.dtype not in _DTYPES:
            raise WeightsError(f"{name!r:.200} has type {entry.dtype!r:.50}, none of {sorted(_DTYPES)}")
        expected = prod(entry.shape) * _DTYPES[entry.dtype].itemsize
        if end - begin != expected:
            raise WeightsError(f"{name!r:.200} {entry.shape} takes {expected} bytes, the file gives {end - begin}")
    extents = sorted((entry.data_offsets[0], entry.data_offsets[1]) for entry in tensors.values())
    borders = [(0, 0), *extents, (num_bytes, num_bytes)]
    if any(left[1] != right[0] for left, right in pairwise(borders)):
        raise WeightsError(f"the tensors do not cover the {num_bytes} data bytes exactly once")


def tensor_bytes(payload: bytes, header: Header) -> Iterator[TensorBytes]:
    """Every tensor of the payload, without a copy."""
    data = memoryview(payload)[header.data_start :]
    for name, entry in header.tensors.items():
        begin, end = entry.data_offsets
        yield TensorBytes(name, entry.dtype, tuple(entry.shape), data[begin:end])


def verify_payload(payload: bytes, *, run_id: str, version: int) -> None:
    """Prove that ``payload`` is version ``version`` of run ``run_id``, every bit of it.

    Raises:
        WeightsError: it is damaged, of another run, version or format.
    """
    header = read_header(payload)
    try:
        metadata = FullMetadata.model_validate(header.metadata)
    except ValidationError as error:
        raise WeightsError(f"version {version}: metadata {sorted(header.metadata)} are incomplete") from error
    found = (metadata.format, metadata.kind, metadata.run_id, metadata.version)
    expected = (FORMAT, "full", run_id, version)
    if found != expected:
        raise WeightsError(f"weights say format, kind, run, version = {found}, expected {expected}")
    checksum = state_checksum(tensor_bytes(payload, header))
    if checksum != metadata.checksum:
        raise WeightsError(f"version {version}: state is {checksum}, its metadata say {metadata.checksum}")
