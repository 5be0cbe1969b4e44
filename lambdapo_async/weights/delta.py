"""The difference of two states: made and applied tensor by tensor, in parallel, bit for bit."""

from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from lambdapo_async.errors import WeightsError
from lambdapo_async.weights.adapter import is_adapter
from lambdapo_async.weights.gaps import Gaps, GapStep, changed_positions, steps_between, values_at
from lambdapo_async.weights.state import State, for_each
from lambdapo_async.weights.tensor_file import BitTensor

Encoding = Literal["gap-step", "gap-abs"]
Change: TypeAlias = Gaps | BitTensor
"""Of one tensor; a ``BitTensor`` replaces it whole or adds it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What makes one state of another."""

    encoding: Encoding
    """``gap-step``: applied exactly once, to exactly its base. ``gap-abs``: any number of times, to any base it covers.

    Steps are defined on 16-bit patterns, so a ``gap-step`` delta carries float32 tensors as ``GapAbs``.
    """
    changes: Mapping[str, Change]
    """Of changed tensors only."""
    removed: tuple[str, ...] = ()
    """Tensors that are no longer there."""
    changed: int
    """Elements that differ, those of new tensors included."""

    def check(self, state: State) -> None:
        """Prove that every part of it can be applied to ``state``.

        Raises:
            WeightsError: a tensor is unknown, of another type or too short, or entries contradict each other.
        """
        for name, change in self.changes.items():
            if isinstance(change, BitTensor):
                continue
            if name not in state.tensors:
                raise WeightsError(f"{name!r:.200} changes and is unknown here")
            change.check(name, state.tensors[name])
        if both := self.changes.keys() & self.removed:
            raise WeightsError(f"{min(both)!r:.200} both changes and is removed")
        absent = self.removed - state.tensors.keys() if self.encoding == "gap-step" else set()
        if absent:
            raise WeightsError(f"{min(absent)!r:.200} is removed and is unknown here")

    def numel_after(self, state: State) -> int:
        """Elements of ``state`` once this is applied to it."""
        whole = {name: change for name, change in self.changes.items() if isinstance(change, BitTensor)}
        gone = sum(tensor.bits.size for name, tensor in state.tensors.items() if name in whole or name in self.removed)
        return state.numel - gone + sum(tensor.bits.size for tensor in whole.values())


def difference(old: State, new: State, pool: Executor) -> Delta:
    """The ``gap-step`` delta from ``old`` to ``new``; digests of unchanged tensors pass from ``old`` to ``new``."""
    found = for_each(lambda name: _changed_tensor(name, old, new), new.largest_first(new.tensors), pool)
    changed = {name: change for name, change in found.items() if change is not None}
    return Delta(
        encoding="gap-step",
        changes={name: change for name, (change, _) in changed.items()},
        removed=tuple(sorted(old.tensors.keys() - new.tensors.keys())),
        changed=sum(count for _, count in changed.values()),
    )


def _changed_tensor(name: str, old: State, new: State) -> tuple[Change, int] | None:
    """The change of one tensor and how many elements of it differ; None if none does.

    Adapters are small and change all over, so they go whole: whoever has the file has them.
    """
    after = new.tensors[name]
    before = old.tensors.get(name)
    if before is None or not before.is_like(after):
        return after, after.bits.size
    if before.bits.ctypes.data == after.bits.ctypes.data:  # frozen weights are published from where they lie
        new.adopt_digest(name, old)
        return None
    gaps: Gaps | None
    if after.bits.itemsize == 2:
        gaps = steps_between(before.bits, after.bits)
    else:
        gaps = values_at(changed_positions(before.bits, after.bits), after)
    if gaps is None:
        new.adopt_digest(name, old)
        return None
    new.digest(name)  # now, while the tensor is in the cache
    change = after if is_adapter(name) else smaller(gaps, after)
    return change, _num_changed(gaps, before, after)


def _num_changed(gaps: Gaps, before: BitTensor, after: BitTensor) -> int:
    """Entries without fillers: a real step is never 0, a real value must be compared."""
    real = gaps.step if isinstance(gaps, GapStep) else before.bits != after.bits
    return int(np.count_nonzero(real))


def smaller(gaps: Gaps, tensor: BitTensor) -> Change:
    """``gaps``, or the whole tensor where that takes fewer bytes; an equal number compresses better as gaps."""
    return tensor if tensor.bits.nbytes < gaps.num_bytes else gaps


def apply(delta: Delta, state: State, *, version: int, checksum: str, pool: Executor) -> None:
    """Make ``state`` version ``version``, in place; whole, or not at all.

    Everything is checked before the first write. The checksum can only be compared afterwards: if it differs, every
    write is undone and ``state`` is what it was. Only a process that dies meanwhile leaves a mixture, so whoever
    keeps a mirror on disk must mark it while it is written.

    Args:
        delta: what to change; its arrays are copied, never kept.
        state: its arrays must be writable and must not be read meanwhile.
        version: what ``state`` becomes.
        checksum: ``xxh3_128:<hex>`` it must have then.
        pool: its threads take one tensor each.

    Raises:
        WeightsError: the delta does not fit, or its result is another; ``state`` is unchanged.
    """
    delta.check(state)
    undo = _write({**delta.changes, **dict.fromkeys(delta.removed)}, state, pool)
    found = state.checksum(pool)
    if found != checksum:
        _write(undo, state, pool)
        raise WeightsError(f"version {version} would be {found} instead of {checksum}; nothing was changed")
    state.version = version


def _write(changes: Mapping[str, Change | None], state: State, pool: Executor) -> Mapping[str, Change | None]:
    """Write every change into ``state``; returns what undoes them."""
    return for_each(lambda name: _write_one(name, changes[name], state), state.largest_first(changes), pool)


def _write_one(name: str, change: Change | None, state: State) -> Change | None:
    before = state.tensors.get(name)
    if change is None:
        state.remove(name)
        return before
    if isinstance(change, BitTensor):
        state.put(name, change.copy())
        undo: Change | None = before
    else:
        state.forget_digest(name)  # first: a write that is cut short must not keep the digest of what was
        undo = change.apply_to(state.tensors[name].bits)
    state.digest(name)  # now, while the tensor is in the cache
    return undo
