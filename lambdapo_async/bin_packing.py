"""Rollouts that share prompts -> the fewest bins of bounded size, in little time.

All lengths are in whole tokens. A prompt takes its room once in each bin that holds a rollout of its family.
"""

import math
from collections.abc import Sequence
from functools import partial
from heapq import heapify, heappop, heappush
from typing import NamedTuple

import numpy as np

LINEAR_TOKENS = 12 * 1024
"""Length whose causal attention costs as much as its matrices: 12 times the hidden size, here that of a 0.6B model."""

LARGEST_SHARE = 16
"""The bound of :func:`fewest_bins` looks at lengths over 1/2, 1/3, ... 1/17 of a bin."""


class Family(NamedTuple):
    """Rollouts of one prompt."""

    prompt: int
    members: tuple[int, ...]
    """The completions' lengths, longest first."""

    @property
    def num_tokens(self) -> int:
        """With the prompt once."""
        return self.prompt + sum(self.members)


class Piece(NamedTuple):
    """Rollouts of one family in one bin."""

    family: int
    members: tuple[int, ...]
    """Positions in ``Family.members``, ascending."""


Bins = list[list[Piece]]


def work(prompt: int, completions: Sequence[int]) -> int:
    """Forward and backward of a prompt with its completions, in units that compare.

    Per token its matrices plus all it attends to; a document of L tokens costs ``work(L, ())``.
    """
    attended = prompt**2 + sum([(prompt + own) ** 2 - prompt**2 for own in completions])
    return (prompt + sum(completions)) * LINEAR_TOKENS + attended


def fewest_bins(families: Sequence[Family], capacity: int) -> int:
    """A number of bins that no packing can go below."""
    by_tokens = math.ceil(sum(map(partial(_least_tokens, capacity=capacity), families)) / capacity)
    alone = [len(family.members) == 1 for family in families]
    lengths_n = np.array([c + only * f.prompt for f, only in zip(families, alone, strict=True) for c in f.members])
    # At most m lengths over 1 / (m + 1) of the capacity share a bin.
    by_count = (math.ceil(int((lengths_n * (m + 1) > capacity).sum()) / m) for m in range(1, 1 + LARGEST_SHARE))
    return max(by_tokens, *by_count, _bins_by_prompts(families, capacity))


def _bins_by_prompts(families: Sequence[Family], capacity: int) -> int:
    """As many as are needed if every bin held the shortest completions under the fewest and shortest prompts."""
    lengths_n = np.sort(np.concatenate([family.members for family in families]))
    counts_n = np.arange(1, len(lengths_n) + 1)
    prompts_n = -(-counts_n // max(len(family.members) for family in families))
    tokens_n = lengths_n.cumsum() + prompts_n * min(family.prompt for family in families)
    return math.ceil(len(lengths_n) / max(1, int((tokens_n <= capacity).sum())))


def _least_tokens(family: Family, capacity: int) -> int:
    """A family too large for a bin repeats its prompt in each that it needs."""
    completions = sum(family.members)
    copies = math.ceil(completions / (capacity - family.prompt)) if completions else 1
    return completions + copies * family.prompt


def partition(families: Sequence[Family], capacity: int, *, multiple_of: int = 1) -> Bins:
    """Every rollout in one bin of at most ``capacity`` tokens: as few bins as found, then the least time.

    Three greedy rules, each good where the others fail: best fit of whole families repeats no prompt, best fit that
    cuts families fills bins better, an even spread keeps lengths just over a share of the capacity from wasting the
    rest. Where none of them finds the fewest bins possible, a slower one chooses what fills each bin best.

    Args:
        families: none with a rollout, prompt included, above ``capacity``.
        capacity: tokens of a bin.
        multiple_of: the number of bins is rounded up to a multiple where there are enough rollouts to do so.

    Returns:
        No empty bin; costliest first, so that what does not fit in memory fails at once.
    """
    if not families:
        return []
    least = fewest_bins(families, capacity)
    candidates = [
        best_fit(families, capacity, cut=False),
        best_fit(families, capacity, cut=True),
        spread(families, capacity, least),
    ]
    if min(map(len, candidates)) > least:
        candidates.append(to_the_brim(families, capacity))
    count = min(len(bins) for bins in candidates)
    rounded = min(sum(len(each.members) for each in families), math.ceil(count / multiple_of) * multiple_of)
    if rounded > least:
        candidates.append(spread(families, capacity, rounded))

    def work_of(bin_: list[Piece]) -> int:
        return sum([work(families[f].prompt, [families[f].members[each] for each in members]) for f, members in bin_])

    def badness(bins: Bins) -> tuple[int, int, int, int]:
        # Of bins that fill as many rounds, more bins are better: a round is as long with a bin missing. A round takes
        # as long as its costliest bin.
        works = sorted(map(work_of, bins), reverse=True)
        return math.ceil(len(bins) / multiple_of), -len(bins), sum(works[::multiple_of]), works[0]

    best: Bins = min(candidates, key=badness)
    return sorted(best, key=work_of, reverse=True)


def best_fit(families: Sequence[Family], capacity: int, *, cut: bool) -> Bins:
    """Each family into the fullest bin that takes it; with ``cut``, what fits of it before a new bin is opened."""
    bins = _Bins(families, capacity)
    bins.pour(capacity, by_work=False, cut=cut)
    return bins.filled()


def spread(families: Sequence[Family], capacity: int, count: int) -> Bins:
    """Each family into the bin with the least work that takes it; ``count`` bins, more only when none does."""
    bins = _Bins(families, capacity, count)
    tokens = sum(family.num_tokens for family in families)
    bins.pour(min(capacity, max(1, tokens // count)), by_work=True, cut=True)
    return bins.filled()


def to_the_brim(families: Sequence[Family], capacity: int) -> Bins:
    """Bin after bin: the largest family, the whole families that fill best what it leaves, and a part of one more."""
    rest = [Piece(number, tuple(range(len(family.members)))) for number, family in enumerate(families)]
    bins: Bins = []
    while rest:
        rest.sort(key=lambda piece: (-_size(families, piece), piece))
        sizes = [_size(families, piece) for piece in rest]
        first, left = _fullest_part(families, rest[0], capacity)
        room = capacity - _size(families, first)
        whole = {1 + position for position in fullest(sizes[1:], room)}
        bin_ = [first, *(rest[position] for position in whole)]
        room -= sum([sizes[position] for position in whole])
        others = [left, *(piece for position, piece in enumerate(rest) if position and position not in whole)]
        parts = [_fullest_part(families, piece, room) for piece in others[1:]]
        gains = [sum([families[part.family].members[each] for each in part.members]) for part, _ in parts]
        if any(gains):  # a repeated prompt only takes room that nothing else had a use for
            best = max(range(len(gains)), key=gains.__getitem__)
            bin_.append(parts[best][0])
            others[1 + best] = parts[best][1]
        bins.append(bin_)
        rest = [piece for piece in others if piece.members]
    return bins


def fullest(sizes: Sequence[int], room: int) -> list[int]:
    """Positions of a subset of ``sizes`` with the greatest sum up to ``room``, the front of the list preferred."""
    # Bit s of reachable[n]: some of the first n sizes add up to s.
    reachable, kept = [1], (2 << room) - 1
    for size in sizes:
        if reachable[-1] >> room:
            break
        reachable.append((reachable[-1] | reachable[-1] << size) & kept if size <= room else reachable[-1])
    total, chosen = reachable[-1].bit_length() - 1, []
    for position in reversed(range(len(reachable) - 1)):
        if not reachable[position] >> total & 1:
            chosen.append(position)
            total -= sizes[position]
    return chosen[::-1]


def _fullest_part(families: Sequence[Family], piece: Piece, room: int) -> tuple[Piece, Piece]:
    """What fills ``room`` best of a piece, and what is left; all of it where that fits."""
    family = families[piece.family]
    lengths = [family.members[member] for member in piece.members]
    if family.prompt + min(lengths) > room:
        return Piece(piece.family, ()), piece
    chosen = {piece.members[position] for position in fullest(lengths, room - family.prompt)}
    if family.prompt + sum(lengths) <= room:
        chosen = set(piece.members)  # those without tokens, too
    part, rest = (tuple(m for m in piece.members if (m in chosen) is wanted) for wanted in (True, False))
    return Piece(piece.family, part), Piece(piece.family, rest)


def _size(families: Sequence[Family], piece: Piece) -> int:
    family = families[piece.family]
    return family.prompt + sum([family.members[member] for member in piece.members])


class _Bins:
    """Bins being filled."""

    def __init__(self, families: Sequence[Family], capacity: int, count: int = 0) -> None:
        self._families, self._capacity = families, capacity
        most = count + sum(len(family.members) for family in families)
        self._rooms, self._works = np.full(most, capacity), np.zeros(most, np.int64)
        self._pieces: Bins = [[] for _ in range(count)]

    def pour(self, limit: int, *, by_work: bool, cut: bool) -> None:
        """Place every family, the largest first, in pieces of at most ``limit`` tokens or of one rollout."""
        waiting: list[tuple[int, Piece]] = []
        for number, family in enumerate(self._families):
            piece = Piece(number, tuple(range(len(family.members))))
            while piece.members:
                part, piece = self._cut(piece, limit)
                if not part.members:  # a single rollout is larger
                    part, piece = Piece(number, piece.members[:1]), Piece(number, piece.members[1:])
                waiting.append((-self._size(part), part))
        heapify(waiting)
        while waiting:
            size, piece = heappop(waiting)
            index = self._choose(-size, by_work=by_work)
            rest = Piece(piece.family, ())
            if index is None:
                index, piece, rest = self._place_for_part(piece, cut=cut)
            self._put(index, piece)
            if rest.members:
                heappush(waiting, (-self._size(rest), rest))

    def filled(self) -> Bins:
        """The bins with anything in them, each family in one piece."""
        merged: Bins = []
        for pieces in filter(None, self._pieces):
            members: dict[int, list[int]] = {}
            for piece in pieces:
                members.setdefault(piece.family, []).extend(piece.members)
            merged.append([Piece(family, tuple(sorted(each))) for family, each in members.items()])
        return merged

    def _choose(self, size: int, *, by_work: bool) -> int | None:
        """The idlest or the fullest bin with room for ``size``; None where no bin has any."""
        fitting = np.flatnonzero(self._rooms[: len(self._pieces)] >= size)
        if not len(fitting):
            return None
        cost = self._works if by_work else self._rooms
        return int(fitting[cost[fitting].argmin()])

    def _place_for_part(self, piece: Piece, *, cut: bool) -> tuple[int, Piece, Piece]:
        """(bin, what goes there, the rest) of a piece that fits nowhere as it is."""
        if cut and self._pieces:
            roomiest = int(self._rooms[: len(self._pieces)].argmax())
            part, rest = self._cut(piece, int(self._rooms[roomiest]))
            if part.members:
                return roomiest, part, rest
        self._pieces.append([])
        return len(self._pieces) - 1, *self._cut(piece, self._capacity)

    def _cut(self, piece: Piece, room: int) -> tuple[Piece, Piece]:
        """What fits into ``room``, the longest rollouts first, and what does not."""
        family = self._families[piece.family]
        room -= family.prompt
        part: list[int] = []
        for member in piece.members:
            if family.members[member] <= room:
                part.append(member)
                room -= family.members[member]
        rest = [member for member in piece.members if member not in part]
        return Piece(piece.family, tuple(part)), Piece(piece.family, tuple(rest))

    def _put(self, index: int, piece: Piece) -> None:
        family = self._families[piece.family]
        self._pieces[index].append(piece)
        self._rooms[index] -= self._size(piece)
        self._works[index] += work(family.prompt, [family.members[member] for member in piece.members])

    def _size(self, piece: Piece) -> int:
        return _size(self._families, piece)
