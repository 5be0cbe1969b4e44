"""One tensor's change: bits to gaps and steps, and back.

``pos = cumsum(gap) + arange(n)`` are the changed positions, row-major and strictly increasing. A distance that a gap
cannot hold is bridged by fillers: entries with the largest gap that change nothing.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lambdapo_async.errors import WeightsError
from lambdapo_async.weights.tensor_file import BITS, BitTensor

WIDE = -128
"""The step that stands for the next of the exceptions."""

_BLOCK = 2**19  # elements compared at once: measured, 2**17 takes a quarter longer: numpy is called more often
_ENTRIES = 2**14  # entries applied at once: measured, 2**12 and 2**17 take 15 % longer


@dataclass(frozen=True, slots=True, eq=False)
class GapStep:
    """Differences of 16-bit patterns: they must be applied exactly once, to exactly the base they were made from."""

    gap: NDArray[np.integer]
    """[n] uint8 or uint16: unchanged elements before each entry."""
    step: NDArray[np.integer]
    """[n] int8: new - old as int16 patterns, modulo 2^16; ``WIDE`` takes the next of ``exc``, a filler has 0."""
    exc: NDArray[np.integer]
    """[m] int16: the steps that int8 cannot hold."""

    @property
    def num_bytes(self) -> int:
        """Size in the file, before compression."""
        return self.gap.nbytes + self.step.nbytes + self.exc.nbytes

    def check(self, name: str, tensor: BitTensor) -> None:
        """``WeightsError`` unless every entry can be applied to ``tensor``."""
        if tensor.bits.itemsize != 2:
            raise WeightsError(f"{name}: steps are of 16-bit patterns, the tensor is {tensor.dtype}")
        _check_entries(name, self.gap, self.step, tensor)
        num_wide = np.count_nonzero(self.step == WIDE)
        if num_wide != self.exc.size:
            raise WeightsError(f"{name}: {num_wide} steps ask for an exception, the file has {self.exc.size}")

    def apply_to(self, bits: NDArray[np.integer]) -> "GapStep":
        """Change ``bits`` in place, after ``check``; returns what undoes it."""
        first = first_exc = 0
        for at in positions(self.gap):
            step = self.step[first : first + at.size].astype(np.int16)
            wide = np.flatnonzero(step == WIDE)
            if wide.size:
                step[wide] = self.exc[first_exc : first_exc + wide.size]
            values = bits.take(at)  # measured, a sixth faster than bits[at] += step
            values += step.view(np.uint16)
            bits[at] = values
            first, first_exc = first + at.size, first_exc + wide.size
        return GapStep(self.gap, np.negative(self.step), np.negative(self.exc))  # -(-128) is -128 in int8

    def changed_positions(self) -> Iterator[NDArray[np.int64]]:
        """Positions in blocks, without fillers."""
        first = 0
        for at in positions(self.gap):
            yield at[self.step[first : first + at.size] != 0]
            first += at.size


@dataclass(frozen=True, slots=True, eq=False)
class GapAbs:
    """New values: applying them again changes nothing."""

    gap: NDArray[np.integer]
    """[n] uint8 or uint16: unchanged elements before each entry."""
    val: BitTensor
    """[n] in the tensor's own type; a filler has the value that is there already."""

    @property
    def num_bytes(self) -> int:
        """Size in the file, before compression."""
        return self.gap.nbytes + self.val.bits.nbytes

    def check(self, name: str, tensor: BitTensor) -> None:
        """``WeightsError`` unless every entry can be applied to ``tensor``."""
        if self.val.dtype != tensor.dtype:
            raise WeightsError(f"{name} is {tensor.dtype}, its new values are {self.val.dtype}")
        _check_entries(name, self.gap, self.val.bits, tensor)

    def apply_to(self, bits: NDArray[np.integer]) -> "GapAbs":
        """Change ``bits`` in place, after ``check``; returns what undoes it."""
        old, first = np.empty_like(self.val.bits), 0
        for at in positions(self.gap):
            entries = slice(first, first + at.size)
            old[entries] = bits[at]
            bits[at] = self.val.bits[entries]
            first += at.size
        return GapAbs(self.gap, BitTensor(self.val.dtype, self.val.shape, old))

    def changed_positions(self) -> Iterator[NDArray[np.int64]]:
        """Positions in blocks, with fillers: only the base could tell them from changes."""
        return positions(self.gap)


Gaps: TypeAlias = GapStep | GapAbs


def _check_entries(name: str, gap: NDArray[np.integer], entries: NDArray[np.integer], tensor: BitTensor) -> None:
    if gap.size != entries.size or gap.size == 0:
        raise WeightsError(f"{name}: {gap.size} gaps for {entries.size} entries; both must be the same and not 0")
    last = int(gap.sum(dtype=np.uint64)) + gap.size - 1
    if last >= tensor.bits.size:
        raise WeightsError(f"{name}: the last position is {last}, the tensor has {tensor.bits.size} elements")


def positions(gap: NDArray[np.integer]) -> Iterator[NDArray[np.int64]]:
    """The positions of all entries, in blocks."""
    next_position = 0
    for start in range(0, gap.size, _ENTRIES):
        at: NDArray[np.int64] = np.cumsum(gap[start : start + _ENTRIES], dtype=np.int64)
        at += np.arange(next_position, next_position + at.size)
        next_position = int(at[-1]) + 1
        yield at


def changed_positions(old: NDArray[np.integer], new: NDArray[np.integer]) -> Iterator[NDArray[np.int64]]:
    """Where the bits of ``old`` and ``new`` differ, in blocks; empty blocks are left out."""
    for at, _, _ in _changes(old, new):
        yield at


def _changes(
    old: NDArray[np.integer], new: NDArray[np.integer]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.integer], NDArray[np.integer]]]:
    """Positions where ``old`` and ``new`` differ, and the patterns there in both, in blocks that are not empty.

    Compared are words of 64 bits, then the elements of those that differ: a quarter of the comparisons' results to
    look through, and what is left to read lies side by side.
    """
    per_word = 8 // old.itemsize
    for start in range(0, old.size, _BLOCK):
        before, after = old[start : start + _BLOCK], new[start : start + _BLOCK]
        words = slice(before.size // per_word * per_word)
        some = _true_at(before[words].view(np.uint64) != after[words].view(np.uint64))
        if before.size % per_word or 2 * some.size * per_word > before.size:
            at = np.flatnonzero(before != after)
            found, olds, news = at + start, before.take(at), after.take(at)
        else:
            olds = before.view(np.uint64).take(some).view(old.dtype)
            news = after.view(np.uint64).take(some).view(new.dtype)
            true_at = np.flatnonzero(olds != news)
            found = some.take(true_at // per_word) * per_word + true_at % per_word + start
            olds, news = olds.take(true_at), news.take(true_at)
        if found.size:
            yield found, olds, news


def _true_at(flags: NDArray[np.bool_]) -> NDArray[np.int64]:
    """``np.flatnonzero``, twice as fast where few are true: eight at a time, then the eights that have one."""
    words = flags[: flags.size // 8 * 8].view(np.uint64)
    some = np.flatnonzero(words != 0)
    if flags.size % 8 or some.size > words.size // 2:
        return np.flatnonzero(flags)
    return of_eights(some, words.take(some).view(np.bool_))


def of_eights(eights: NDArray[np.int64], flags: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Where ``flags`` are true, if every eight of them stand for the elements of one of ``eights``."""
    true_at = np.flatnonzero(flags)
    at: NDArray[np.int64] = (eights.take(true_at >> 3) << 3) + (true_at & 7)
    return at


def steps_between(old: NDArray[np.integer], new: NDArray[np.integer]) -> GapStep | None:
    """What changes 16-bit patterns ``old`` into ``new``; None if they are the same."""
    changed, steps = [], []
    for at, before, after in _changes(old, new):
        changed.append(at.astype(np.uint32))
        steps.append(after - before)
    if not steps:
        return None
    gap, entries = _packed(_distances(np.concatenate(changed)), entry_bytes=1)
    wide_step = np.concatenate(steps).view(np.int16)
    narrow_step = wide_step.astype(np.int8)
    wide = np.flatnonzero((narrow_step != wide_step) | (narrow_step == WIDE))
    narrow_step[wide] = WIDE
    step = np.zeros(gap.size, np.int8)
    step[entries] = narrow_step
    return GapStep(gap, step, wide_step[wide])


def values_at(blocks: Iterable[NDArray[np.int64]], tensor: BitTensor) -> GapAbs | None:
    """The values of ``tensor`` at increasing positions; None if there are no positions."""
    changed = [at.astype(np.uint32) for at in blocks]
    if not changed:
        return None
    gap, _ = _packed(_distances(np.concatenate(changed)), entry_bytes=tensor.bits.itemsize)
    values = np.concatenate([tensor.bits[at] for at in positions(gap)])
    return GapAbs(gap, BitTensor(tensor.dtype, (gap.size,), values))


def _distances(at: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """[n] unchanged elements before each position."""
    distances = at.copy()
    distances[1:] -= at[:-1]
    distances[1:] -= 1
    return distances


def _packed(
    distances: NDArray[np.uint32], *, entry_bytes: int
) -> tuple[NDArray[np.integer], NDArray[np.int64] | slice]:
    """Gaps of the width that needs fewer bytes with its fillers, and where in them the given distances are."""
    fillers = {dtype: distances >> (8 * dtype.itemsize) for dtype in (BITS["U8"], BITS["U16"])}
    num_fillers = {dtype: int(each.sum(dtype=np.int64)) for dtype, each in fillers.items()}
    dtype = min(fillers, key=lambda dtype: (distances.size + num_fillers[dtype]) * (dtype.itemsize + entry_bytes))
    if num_fillers[dtype] == 0:
        return distances.astype(dtype), slice(None)
    entries = np.arange(distances.size) + np.cumsum(fillers[dtype], dtype=np.int64)
    largest = 2 ** (8 * dtype.itemsize) - 1
    gap = np.full(distances.size + num_fillers[dtype], largest, dtype)
    gap[entries] = distances & largest
    return gap, entries
