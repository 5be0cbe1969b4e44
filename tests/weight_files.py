"""Weight files with made-up contents, as a store sees them."""

from lambdapo_async.weights.catch_up import Available
from lambdapo_async.weights.manifest import NewFile


def full(version: int, payload: bytes = b"whole") -> NewFile:
    return NewFile(Available(version=version, num_bytes=len(payload)), payload)


def step(version: int, payload: bytes = b"step") -> NewFile:
    return NewFile(Available(version=version, num_bytes=len(payload), base_version=version - 1), payload)


def union(version: int, keyframe: int, payload: bytes = b"union") -> NewFile:
    available = Available(version=version, num_bytes=len(payload), base_version=keyframe, base_min=keyframe)
    return NewFile(available, payload)
