"""What the projection holds at once, and how it cuts the vocabulary to hold no more."""

import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from learner.projection import project
from tests.products import Products


class LiveMemory(TorchDispatchMode):
    """Notes the most bytes that were alive at once of tensors made under it."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given | self._sizes.keys():
                self._watch(leaf.untyped_storage())
        self.peak = max(self.peak, sum(self._sizes.values()))
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        self._sizes[key] = storage.nbytes()
        self._references[key] = weakref.ref(storage, lambda _: self._sizes.pop(key))


def peak_bytes(positions: int, vocabulary: int, chunk_logits: int, kept_logits: int = 0) -> int:
    """Of forward and backward pass, entropy in the loss."""
    head = nn.Linear(4, vocabulary)
    hidden_SE, target_S = torch.randn(positions, 4, requires_grad=True), torch.randint(vocabulary, (positions,))
    with LiveMemory() as memory:
        logprobs_S, entropy_S = project(
            head, hidden_SE, target_S, temperature=0.9, chunk_logits=chunk_logits, kept_logits=kept_logits
        )
        (logprobs_S.sum() + entropy_S.sum()).backward()
    return memory.peak


def test_memory_does_not_grow_with_positions_times_vocabulary() -> None:
    """64 times the logits: 2 MiB in float32, of which 64 KiB may exist."""
    small, large = peak_bytes(32, 256, 2**14), peak_bytes(256, 2048, 2**14)
    own = 4 * 2048 * (4 + 1) + 4 * 256 * (4 + 12)  # gradients of layer and hidden states, and per-position numbers
    assert large < 3 * 4 * 2**14 + 2 * own
    assert large - small < 2 * own
    assert peak_bytes(256, 2048, 256 * 2048) > 4 * 256 * 2048  # the measure sees logits where they are kept


def test_kept_logits_take_what_they_may_and_nothing_without_gradient() -> None:
    kept, none = (peak_bytes(256, 2048, 2**14, kept_logits) for kept_logits in (2**17, 0))
    assert 0.8 * 4 * 2**17 < kept - none < 1.1 * 4 * 2**17
    head, hidden_SE, target_S = nn.Linear(4, 2048), torch.randn(256, 4, requires_grad=True), torch.randint(2048, (256,))
    with torch.no_grad(), LiveMemory() as memory:
        project(head, hidden_SE, target_S, temperature=0.9, chunk_logits=2**14, kept_logits=2**17)
    assert memory.peak < none


@pytest.mark.parametrize(
    ("vocabulary", "chunk_logits", "num_chunks"),
    [
        (440, 2 * 150, 4),  # 128 columns, the multiple of 64 below 150, which would do with three
        (440, 2 * 64, 7),
        (440, 2 * 60, 8),  # too few to round down
        (11, 1, 11),  # one column is the least
    ],
)
def test_columns_are_cut_at_multiples_of_64_where_there_are_so_many(
    vocabulary: int, chunk_logits: int, num_chunks: int
) -> None:
    with torch.no_grad(), Products() as products:
        project(
            nn.Linear(4, vocabulary),
            torch.randn(2, 4),
            torch.zeros(2, dtype=torch.int64),
            temperature=1.0,
            chunk_logits=chunk_logits,
        )
    assert products.count == num_chunks
