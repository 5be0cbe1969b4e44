"""Rollout groups -> the sequences that the learner trains on, and the proximal policy's confidence in them."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lambdapo_async.config import RunConfig
from lambdapo_async.objective.advantage import group_confidence
from lambdapo_async.packing import MicroBatch, TrainingSequence, pack
from lambdapo_async.rank_balance import split_over_ranks
from learner.arrivals import ReceivedGroup
from learner.parallel import ALONE, Ranks
from learner.policy import Policy


def training_sequences(groups: Sequence[ReceivedGroup], advantages_BG: Tensor) -> list[TrainingSequence]:
    """One sequence per rollout: prompt and completion, with every column aligned to its own token."""
    return [
        _training_sequence(received, rollout_index, float(advantages_BG[group_index, rollout_index]))
        for group_index, received in enumerate(groups)
        for rollout_index in range(len(received.group.rollouts))
    ]


def rank_shares(sequences: Sequence[TrainingSequence], *, token_budget: int, num_shares: int) -> list[list[MicroBatch]]:
    """The micro-batches of each share, of equal number; every rank knows ``sequences``, so all split them alike."""
    micro_batches = pack(sequences, token_budget=token_budget, multiple_of=num_shares)
    return split_over_ranks(micro_batches, num_shares)


def proximal_confidence(
    policy: Policy, groups: Sequence[ReceivedGroup], config: RunConfig, ranks: Ranks = ALONE
) -> NDArray[np.float64]:
    """[B, G] float64 confidence of each rollout under ``policy`` as it is now: one forward pass over all groups."""
    num_groups, group_size = len(groups), len(groups[0].group.rollouts)
    # Packing reorders: each rollout's number travels in the column that no forward pass reads (exact to 2^24).
    numbers_BG = torch.arange(num_groups * group_size).reshape(num_groups, group_size)
    logprobs: list[NDArray[np.float32]] = [np.zeros(0, np.float32)] * (num_groups * group_size)
    sequences = training_sequences(groups, numbers_BG)
    columns: list[Tensor] = []
    shares = rank_shares(sequences, token_budget=config.learner.micro_batch_tokens, num_shares=ranks.num_shares)
    for micro_batch in shares[ranks.share_index]:
        mask_T = micro_batch.loss_mask_T
        columns += policy.logprobs(micro_batch.to(policy.device)).cpu()[mask_T], micro_batch.advantages_T[mask_T]
    for collected in ranks.collect(columns):
        for logprobs_K, numbers_K in zip(collected[::2], collected[1::2], strict=True):
            for number in set(numbers_K.long().tolist()):
                logprobs[number] = logprobs_K[numbers_K == number].numpy()
    kind = config.objective.advantage.confidence
    return np.stack([group_confidence([logprobs[n] for n in row], kind)[0] for row in numbers_BG.tolist()])


def _training_sequence(received: ReceivedGroup, rollout_index: int, advantage: float) -> TrainingSequence:
    prompt_ids = received.group.prompt_ids
    rollout = received.group.rollouts[rollout_index]
    prompt_length = len(prompt_ids)
    return TrainingSequence(
        token_ids=np.concatenate([prompt_ids, rollout.completion_ids]),
        loss_mask=np.arange(prompt_length + rollout.num_tokens) >= prompt_length,
        behavior_logprobs=np.concatenate([np.zeros(prompt_length, np.float32), rollout.behavior_logprobs]),
        advantage=advantage,
        token_versions=np.concatenate([np.full(prompt_length, -1, np.int64), rollout.token_versions]),
        group_key=received.group.lease.id,
    )
