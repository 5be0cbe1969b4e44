"""Micro-batches -> an equal number for each rank, of like work at every turn.

Ranks that shard parameters (FSDP) gather them together in every forward pass: all must run equally many, and
each pass lasts as long as the slowest rank's.
"""

from collections.abc import Sequence

import torch

from lambdapo_async.bin_packing import LINEAR_TOKENS
from lambdapo_async.packed_layout import Segment, packed_layout
from lambdapo_async.packing import MicroBatch


def split_over_ranks(micro_batches: Sequence[MicroBatch], world_size: int) -> list[list[MicroBatch]]:
    """Deal micro-batches to ranks: entry ``r`` is what rank ``r`` runs, in order.

    The costliest ``world_size`` micro-batches run together, then the next ones; within a turn the costliest goes to
    the rank with the least work so far. Total work of two ranks therefore never differs by more than the costliest
    micro-batch. Pack with ``multiple_of=world_size`` so that every turn is full; what is missing in the last turn is
    filled with :func:`filler`.

    Args:
        micro_batches: of one optimizer step, on the CPU.
        world_size: data-parallel ranks, at least 1.

    Returns:
        ``world_size`` lists of equal length; deterministic.
    """
    ordered = sorted(micro_batches, key=work_of, reverse=True)
    ordered += [filler() for _ in range(-len(ordered) % world_size)]
    shares: list[list[MicroBatch]] = [[] for _ in range(world_size)]
    done = [0] * world_size
    for start in range(0, len(ordered), world_size):
        ranks = sorted(range(world_size), key=done.__getitem__)
        for rank, micro_batch in zip(ranks, ordered[start : start + world_size], strict=True):
            shares[rank].append(micro_batch)
            done[rank] += work_of(micro_batch)
    return shares


def work_of(micro_batch: MicroBatch) -> int:
    """What a micro-batch costs, in the units of ``bin_packing.work``."""
    return micro_batch.layout.num_tokens * LINEAR_TOKENS + micro_batch.layout.squares


def filler() -> MicroBatch:
    """One token without loss: a forward and backward pass that adds exactly zero to the gradient."""
    zero = torch.zeros(1, dtype=torch.int64)
    return MicroBatch(
        input_ids_T=zero,
        position_ids_T=zero,
        predictor_T=zero,
        layout=packed_layout([Segment(1)]),
        loss_mask_T=torch.zeros(1, dtype=torch.bool),
        behavior_logprobs_T=torch.zeros(1),
        advantages_T=torch.zeros(1),
        token_versions_T=zero - 1,
        segment_ids_T=zero,
        num_loss_tokens=0,
        group_keys=("",),
    )
