"""Which tokens of a micro-batch attend to which: documents side by side, and completions that share a prompt.

T packed tokens in N segments. A segment is a document, a prompt that several completions continue, or such a
completion; its tokens see the prompt it continues, if any, and what comes before them in the segment. Causal attention
is aligned at the end (bottom right), as FlashAttention's varlen kernels do with fewer queries than keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Segment(NamedTuple):
    """Tokens in a row."""

    length: int
    prompt: range = range(0)
    """Tokens of the micro-batch that they continue; of a document none."""


@dataclass(frozen=True)
class SharedKeys:
    """Keys where segments share prompts: each segment's prompt, then its own tokens; K in all."""

    cu_seqlens: Tensor
    """[N + 1] int32 first key of each segment, then K."""
    max_seqlen: int
    """Keys of the segment with most."""
    index_K: Tensor
    """int64 token whose key it is."""


@dataclass(frozen=True)
class PackedLayout:
    """Where each segment lies in a micro-batch; made once, read by every layer."""

    cu_seqlens: Tensor
    """[N + 1] int32 first token of each segment, then T."""
    max_seqlen: int
    """Tokens of the longest segment."""
    shapes: tuple[tuple[int, int], ...]
    """(tokens, keys) of each segment, for those on the host who want to know and not wait for a device."""
    shared: SharedKeys | None = None
    """None where every segment is a document: its keys are its own tokens."""

    @property
    def key_marks(self) -> Tensor:
        """[N + 1] int32 first key of each segment, then their number."""
        return self.cu_seqlens if self.shared is None else self.shared.cu_seqlens

    @property
    def max_keys(self) -> int:
        """Keys of the segment with most."""
        return self.max_seqlen if self.shared is None else self.shared.max_seqlen

    @cached_property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """Neighbours alike: (segments, tokens of each, keys of each); documents of 3, 3, 2 are (2, 3, 3), (1, 2, 2)."""
        return tuple((len(list(run)), *shape) for shape, run in groupby(self.shapes))

    @cached_property
    def num_tokens(self) -> int:
        """T."""
        return sum(tokens for tokens, _ in self.shapes)

    @property
    def squares(self) -> int:
        """Twice the pairs of query and key: the square of its length for a document."""
        return sum(keys * keys - (keys - queries) ** 2 for queries, keys in self.shapes)

    def to(self, device: torch.device) -> "PackedLayout":
        """The same layout on ``device``, from the host; nobody waits for what the device does."""
        keys = self.shared
        if keys is not None:
            cu_seqlens = keys.cu_seqlens.to(device, non_blocking=True)
            keys = SharedKeys(cu_seqlens, keys.max_seqlen, keys.index_K.to(device, non_blocking=True))
        return PackedLayout(self.cu_seqlens.to(device, non_blocking=True), self.max_seqlen, self.shapes, keys)


def packed_layout(segments: Sequence[Segment]) -> PackedLayout:
    """The layout of ``segments``, which lie in this order and have at least one token each."""
    lengths = [segment.length for segment in segments]
    cu_seqlens = _marks(lengths)
    if not any(segment.prompt for segment in segments):
        return PackedLayout(cu_seqlens, max(lengths), tuple((length, length) for length in lengths))
    marks: list[int] = cu_seqlens.tolist()
    keys = [
        np.arange(*bounds)
        for segment, own in zip(segments, pairwise(marks), strict=True)
        for bounds in ((segment.prompt.start, segment.prompt.stop), own)
    ]
    counts = [len(segment.prompt) + segment.length for segment in segments]
    shared = SharedKeys(_marks(counts), max(counts), torch.from_numpy(np.concatenate(keys)))
    return PackedLayout(cu_seqlens, max(lengths), tuple(zip(lengths, counts, strict=True)), shared)


def _marks(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
