"""Sequences -> micro-batches of at most ``token_budget`` tokens, without padding.

T = tokens of a micro-batch, N = its documents, L = tokens of one sequence. Every per-token column describes the token
at its own position t: ``logprobs_T[t]`` = log pi(token t | the tokens before it in its document).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lambdapo_async.bin_packing import partition


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainingSequence:
    """One rollout as the learner trains on it: prompt, then completion."""

    token_ids: NDArray[np.int32]
    """[L]"""
    loss_mask: NDArray[np.bool_]
    """[L] True for tokens that the policy produced; never for the first, which nothing predicts."""
    behavior_logprobs: NDArray[np.float32]
    """[L] log mu, 0 where there is no loss."""
    advantage: float
    token_versions: NDArray[np.int64]
    """[L] policy version that produced the token, -1 in the prompt."""
    group_key: str
    """Names the group in errors."""

    def __post_init__(self) -> None:
        shapes = [column.shape for column in (self.loss_mask, self.behavior_logprobs, self.token_versions)]
        if self.token_ids.ndim != 1 or any(shape != self.token_ids.shape for shape in shapes):
            raise ValueError(f"group {self.group_key}: columns of {self.token_ids.shape} tokens have shapes {shapes}")
        if len(self.token_ids) == 0 or self.loss_mask[0]:
            raise ValueError(f"group {self.group_key}: a sequence needs a first token without loss")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MicroBatch:
    """Documents side by side; attention must not cross ``cu_seqlens``."""

    input_ids_T: Tensor
    """int64"""
    position_ids_T: Tensor
    """int64, from 0 in every document."""
    cu_seqlens: Tensor
    """[N + 1] int32 document boundaries, from 0 to T."""
    max_seqlen: int
    """Tokens of the longest document."""
    loss_mask_T: Tensor
    """bool"""
    behavior_logprobs_T: Tensor
    """float32"""
    advantages_T: Tensor
    """float32"""
    token_versions_T: Tensor
    """int64"""
    segment_ids_T: Tensor
    """int64 number of the token's document, 0..N-1."""

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch on ``device``."""
        return MicroBatch(
            input_ids_T=self.input_ids_T.to(device),
            position_ids_T=self.position_ids_T.to(device),
            cu_seqlens=self.cu_seqlens.to(device),
            max_seqlen=self.max_seqlen,
            loss_mask_T=self.loss_mask_T.to(device),
            behavior_logprobs_T=self.behavior_logprobs_T.to(device),
            advantages_T=self.advantages_T.to(device),
            token_versions_T=self.token_versions_T.to(device),
            segment_ids_T=self.segment_ids_T.to(device),
        )


def pack(sequences: Sequence[TrainingSequence], *, token_budget: int, multiple_of: int = 1) -> list[MicroBatch]:
    """The fewest micro-batches found, alike in attention and matrix work; see ``bin_packing``.

    Deterministic in the set of groups: the order they arrive in changes no bit of any micro-batch, as long as the
    sequences of one group keep theirs. Documents lie longest first, those of equal length side by side.

    Args:
        sequences: whole groups.
        token_budget: most tokens of a micro-batch.
        multiple_of: number of ranks that share the micro-batches; see ``rank_balance.split_over_ranks``.

    Raises:
        ValueError: a sequence is longer than ``token_budget``.
    """
    ordered = sorted(sequences, key=lambda each: (-len(each.token_ids), each.group_key))
    lengths = [len(each.token_ids) for each in ordered]
    if lengths and lengths[0] > token_budget:
        raise ValueError(
            f"a sequence of group {ordered[0].group_key} has {lengths[0]} tokens, more than the micro-batch budget of "
            f"{token_budget}: raise learner.micro_batch_tokens or lower model.max_length"
        )
    bins = partition(lengths, token_budget, multiple_of=multiple_of)
    return [_micro_batch([ordered[position] for position in positions]) for positions in bins]


def _micro_batch(documents: Sequence[TrainingSequence]) -> MicroBatch:
    lengths_N = np.array([len(document.token_ids) for document in documents])
    ends_N = lengths_N.cumsum()
    advantages_N = np.array([document.advantage for document in documents], np.float32)
    return MicroBatch(
        input_ids_T=_column([document.token_ids for document in documents], np.int64),
        position_ids_T=torch.from_numpy(np.arange(ends_N[-1]) - np.repeat(ends_N - lengths_N, lengths_N)),
        cu_seqlens=_column([np.zeros(1), ends_N], np.int32),
        max_seqlen=int(lengths_N.max()),
        loss_mask_T=_column([document.loss_mask for document in documents], np.bool_),
        behavior_logprobs_T=_column([document.behavior_logprobs for document in documents], np.float32),
        advantages_T=torch.from_numpy(np.repeat(advantages_N, lengths_N)),
        token_versions_T=_column([document.token_versions for document in documents], np.int64),
        segment_ids_T=torch.from_numpy(np.repeat(np.arange(len(documents)), lengths_N)),
    )


def _column(parts: Sequence[np.ndarray], dtype: type[np.generic]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(dtype))
