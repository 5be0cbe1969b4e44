"""Lengths -> the fewest bins of bounded size, their work alike.

n lengths, longest first, in whole tokens. A bin is the list of positions it holds in that order.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heapify, heappop, heappush, heapreplace

import numpy as np

LINEAR_TOKENS = 12 * 1024
"""Length whose causal attention costs as much as its matrices: 12 times the hidden size, here that of a 0.6B model."""

LARGEST_SHARE = 16
"""The bound of :func:`fewest_bins` looks at lengths over 1/2, 1/3, ... 1/17 of a bin."""

Bins = list[list[int]]


def work(lengths: Sequence[int]) -> int:
    """Forward and backward of documents, in units that compare: per token its matrices plus all it attends to."""
    return sum([length * (length + LINEAR_TOKENS) for length in lengths])


def fewest_bins(lengths: Sequence[int], capacity: int) -> int:
    """A number of bins that no packing can go below."""
    lengths_n = np.asarray(lengths)
    by_tokens = math.ceil(int(lengths_n.sum()) / capacity)
    # At most m lengths over 1 / (m + 1) of the capacity share a bin.
    by_count = (math.ceil(int((lengths_n * (m + 1) > capacity).sum()) / m) for m in range(1, 1 + LARGEST_SHARE))
    return max(by_tokens, *by_count)


def partition(lengths: Sequence[int], capacity: int, *, multiple_of: int = 1) -> Bins:
    """Every position in one bin of at most ``capacity`` tokens; as few bins as found, then the least work in the worst.

    Two greedy rules, each good where the other fails: best fit fills bins of mixed lengths to the brim, an even
    spread keeps lengths just over a share of the capacity from wasting the rest. Takes O(n log n).

    Args:
        lengths: in descending order, none above ``capacity``.
        capacity: tokens of a bin.
        multiple_of: the number of bins is rounded up to a multiple where there are enough lengths to do so.

    Returns:
        No empty bin; costliest first, so that what does not fit in memory fails at once.
    """
    if not lengths:
        return []
    least = fewest_bins(lengths, capacity)
    candidates = [best_fit(lengths, capacity), spread(lengths, capacity, least)]
    count = min(len(bins) for bins in candidates)
    rounded = min(len(lengths), math.ceil(count / multiple_of) * multiple_of)
    if rounded > least:
        candidates.append(spread(lengths, capacity, rounded))

    def work_of(bin_: list[int]) -> int:
        return work([lengths[position] for position in bin_])

    def badness(bins: Bins) -> tuple[int, int, int]:
        # Of bins that fill as many rounds, more bins are better: a round is as long with a bin missing.
        return math.ceil(len(bins) / multiple_of), -len(bins), max(map(work_of, bins))

    best: Bins = min(candidates, key=badness)
    return sorted(best, key=work_of, reverse=True)


def best_fit(lengths: Sequence[int], capacity: int) -> Bins:
    """Each length into the fullest bin that takes it."""
    bins: Bins = []
    rooms: list[tuple[int, int]] = []  # (room, bin), ascending; bins that nothing fits into are left out
    for position, length in enumerate(lengths):
        at = bisect_left(rooms, (length, 0))
        if at == len(rooms):
            bins.append([])
            room, index = capacity, len(bins) - 1
        else:
            room, index = rooms.pop(at)
        bins[index].append(position)
        if room - length >= lengths[-1]:
            insort(rooms, (room - length, index))
    return bins


def spread(lengths: Sequence[int], capacity: int, count: int) -> Bins:
    """Each length into the bin with the least work that takes it; ``count`` bins, more only when none does."""
    bins: Bins = [[] for _ in range(count)]
    rooms = [capacity] * count
    ready = [(0, index) for index in range(count)]
    full: list[tuple[int, int, int]] = []  # (-room, work, bin) of bins that wait for something short enough
    heapify(ready)
    for position, length in enumerate(lengths):
        while full and -full[0][0] >= length:
            heappush(ready, heappop(full)[1:])
        while ready and rooms[ready[0][1]] < length:
            done, index = heappop(ready)
            heappush(full, (-rooms[index], done, index))
        if not ready:
            ready.append((0, len(bins)))
            bins.append([])
            rooms.append(capacity)
        done, index = ready[0]
        heapreplace(ready, (done + length * (length + LINEAR_TOKENS), index))
        bins[index].append(position)
        rooms[index] -= length
    return bins
