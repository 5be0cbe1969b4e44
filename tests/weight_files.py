"""Weight files with made-up contents, as a store sees them."""

from lambdapo_async.broker.interface import WeightStore
from lambdapo_async.weights.catch_up import Available
from lambdapo_async.weights.manifest import NewFile


def full(version: int, payload: bytes = b"whole") -> NewFile:
    return NewFile(Available(version=version, num_bytes=len(payload)), payload)


def step(version: int, payload: bytes = b"step") -> NewFile:
    return NewFile(Available(version=version, num_bytes=len(payload), base_version=version - 1), payload)


def union(version: int, keyframe: int, payload: bytes = b"union") -> NewFile:
    available = Available(version=version, num_bytes=len(payload), base_version=keyframe, base_min=keyframe)
    return NewFile(available, payload)


def publish(store: WeightStore, *files: NewFile, consumed: int = 0, fence: int = 1) -> None:
    store.publish(files[0].available.version, files, consumed=consumed, fence=fence)


def names(store: WeightStore) -> list[tuple[int, int | None, int | None]]:
    return [(file.version, file.base_version, file.base_min) for file in store.files()]
