"""Everything that changed since a keyframe, one bit per element: the file that leads there from any version since."""

from collections.abc import Iterator
from concurrent.futures import Executor

import numpy as np
from numpy.typing import NDArray

from lambdapo_async.weights.delta import Change, Delta, smaller
from lambdapo_async.weights.delta_file import DeltaFile, DeltaMetadata
from lambdapo_async.weights.gaps import of_eights, values_at
from lambdapo_async.weights.state import State, for_each
from lambdapo_async.weights.tensor_file import BitTensor

_BLOCK = 2**14  # bytes of a mask: 131,072 elements


class Union:
    """The changes of all versions since a keyframe. Not thread-safe: one caller.

    A bit may stand for an element that changed and changed back, or for a filler: the union file then carries a value
    that is there already. It never misses a change.
    """

    def __init__(self, keyframe: State, pool: Executor) -> None:
        """Starts with no changes; keeps nothing of ``keyframe`` but its version, checksum and layout."""
        self._version = keyframe.version
        self._checksum = keyframe.checksum(pool)
        self._numel = {name: tensor.bits.size for name, tensor in keyframe.tensors.items()}
        self._masks: dict[str, NDArray[np.uint8]] = {}
        self._whole = set[str]()
        self._ever = set(keyframe.tensors)

    @property
    def keyframe_version(self) -> int:
        """Oldest version the union leads from."""
        return self._version

    def changed_share(self) -> float:
        """Changed elements per element of the keyframe; what was replaced whole counts as changed."""
        whole = sum(self._numel.get(name, 0) for name in self._whole)
        changed = sum(int(np.bitwise_count(mask).sum(dtype=np.int64)) for mask in self._masks.values())
        return (whole + changed) / max(1, sum(self._numel.values()))

    def record(self, delta: Delta) -> None:
        """Add the changes of the next version, once it is published."""
        for name, change in delta.changes.items():
            self._ever.add(name)
            if isinstance(change, BitTensor) or name in self._whole:
                self._whole.add(name)
                self._masks.pop(name, None)
                continue
            mask = self._masks.setdefault(name, np.zeros((self._numel[name] + 7) // 8, np.uint8))
            for at in change.changed_positions():
                np.bitwise_or.at(mask, at >> 3, np.left_shift(1, at & 7).astype(np.uint8))
        for name in delta.removed:
            self._masks.pop(name, None)

    def file(self, state: State, *, run_id: str, pool: Executor) -> DeltaFile:
        """The file that makes ``state`` of the keyframe and of every version recorded since."""
        delta = self._delta(state, pool)
        metadata = DeltaMetadata(
            kind="delta",
            run_id=run_id,
            version=state.version,
            checksum=state.checksum(pool),
            keyframe_version=self._version,
            numel=state.numel,
            base_version=self._version,
            base_min=self._version,
            base_checksum=self._checksum,
            encoding=delta.encoding,
            changed=delta.changed,
            removed=delta.removed,
        )
        return DeltaFile(metadata, delta)

    def _delta(self, state: State, pool: Executor) -> Delta:
        names = (self._whole | self._masks.keys()) & state.tensors.keys()
        changes = for_each(lambda name: self._change(name, state), state.largest_first(names), pool)
        return Delta(
            encoding="gap-abs",
            changes={name: change for name, change in changes.items() if change is not None},
            removed=tuple(sorted(self._ever - state.tensors.keys())),
            changed=sum(self._num_changed(name, state) for name in names),
        )

    def _change(self, name: str, state: State) -> Change | None:
        tensor = state.tensors[name]
        if name in self._whole:
            return tensor
        gaps = values_at(_set_bits(self._masks[name]), tensor)
        return None if gaps is None else smaller(gaps, tensor)

    def _num_changed(self, name: str, state: State) -> int:
        if name in self._whole:
            return state.tensors[name].bits.size
        return int(np.bitwise_count(self._masks[name]).sum(dtype=np.int64))


def _set_bits(mask: NDArray[np.uint8]) -> Iterator[NDArray[np.int64]]:
    """Positions of the bits that are set, in blocks; empty blocks are left out."""
    for start in range(0, mask.size, _BLOCK):
        block = mask[start : start + _BLOCK]
        some = np.flatnonzero(block != 0)
        if some.size:
            yield of_eights(some, np.unpackbits(block[some], bitorder="little").view(np.bool_)) + 8 * start
