"""Another reader of weight files, written from the format's description alone: Python loops over plain safetensors."""

import json
import struct
from collections.abc import Mapping

import xxhash
import zstandard

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]
"""Type, shape and little-endian bytes of every tensor by name."""

SIZES = {"U8": 1, "I8": 1, "U16": 2, "I16": 2, "BF16": 2, "F16": 2, "F32": 4}


def read(payload: bytes) -> tuple[Tensors, dict[str, str]]:
    """Tensors and metadata of a file, compressed or not."""
    if payload[:4] == bytes.fromhex("28b52ffd"):
        payload = zstandard.ZstdDecompressor().decompress(payload)
    (length,) = struct.unpack_from("<Q", payload)
    header = json.loads(payload[8 : 8 + length])
    metadata = header.pop("__metadata__")
    tensors: Tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = (entry["dtype"], tuple(entry["shape"]), payload[8 + length + begin : 8 + length + end])
    return tensors, metadata


def checksum(state: Mapping[str, tuple[str, tuple[int, ...], bytes]]) -> str:
    """The state checksum, from one buffer."""
    buffer = b""
    for name in sorted(state):
        dtype, shape, data = state[name]
        buffer += (
            name.encode() + b"\0" + dtype.encode() + b"\0" + ",".join(str(size) for size in shape).encode() + b"\0"
        )
        buffer += xxhash.xxh3_128(data).digest()
    return "xxh3_128:" + xxhash.xxh3_128(buffer).hexdigest()


def apply(payload: bytes, base: Tensors) -> Tensors:
    """The state that a delta file makes of ``base``; asserts that it is the promised one."""
    parts, metadata = read(payload)
    state = dict(base)
    for name in json.loads(metadata["removed"]):
        state.pop(name, None)
    for key, (dtype, shape, data) in parts.items():
        name, separator, part = key.partition("::")
        if not separator:
            state[name] = (dtype, shape, data)
        elif part == "step":
            state[name] = with_steps(
                state[name], integers(parts[name + "::gap"]), integers(parts[key]), exceptions(parts, name)
            )
        elif part == "val":
            state[name] = with_values(state[name], integers(parts[name + "::gap"]), data)
    assert checksum(state) == metadata["checksum"]
    return state


def exceptions(parts: Tensors, name: str) -> list[int]:
    return integers(parts[name + "::exc"]) if name + "::exc" in parts else []


def integers(tensor: tuple[str, tuple[int, ...], bytes]) -> list[int]:
    dtype, _, data = tensor
    size = SIZES[dtype]
    return [
        int.from_bytes(data[first : first + size], "little", signed=dtype.startswith("I"))
        for first in range(0, len(data), size)
    ]


def with_steps(
    tensor: tuple[str, tuple[int, ...], bytes], gaps: list[int], steps: list[int], exceptions: list[int]
) -> tuple[str, tuple[int, ...], bytes]:
    dtype, shape, data = tensor
    patterns = [int.from_bytes(data[first : first + 2], "little") for first in range(0, len(data), 2)]
    remaining = list(exceptions)
    position = -1
    for gap, step in zip(gaps, steps, strict=True):
        position += gap + 1
        actual = remaining.pop(0) if step == -128 else step
        patterns[position] = (patterns[position] + actual) % 2**16
    assert not remaining
    return dtype, shape, b"".join(pattern.to_bytes(2, "little") for pattern in patterns)


def with_values(
    tensor: tuple[str, tuple[int, ...], bytes], gaps: list[int], values: bytes
) -> tuple[str, tuple[int, ...], bytes]:
    dtype, shape, data = tensor
    size = SIZES[dtype]
    changed = bytearray(data)
    position = -1
    for index, gap in enumerate(gaps):
        position += gap + 1
        changed[position * size : (position + 1) * size] = values[index * size : (index + 1) * size]
    return dtype, shape, bytes(changed)
