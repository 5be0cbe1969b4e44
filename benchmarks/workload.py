"""One step's data: groups with random tokens of given lengths, the same in every process."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.lengths import GroupLengths
from lambdapo_async.broker.interface import Descriptor
from lambdapo_async.config import RunConfig
from lambdapo_async.objective.advantage import estimate_advantages
from lambdapo_async.packing import TrainingSequence, pack
from lambdapo_async.rollout import Lease, Rollout, RolloutGroup, Timing, VersionSpan
from learner.arrivals import ReceivedGroup
from learner.sequences import training_sequences


@dataclass(frozen=True, slots=True)
class Workload:
    """What one optimizer step trains on."""

    groups: tuple[ReceivedGroup, ...]
    sequences: tuple[TrainingSequence, ...]
    """The same rollouts with their advantages, group by group."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [len(sequence.token_ids) for sequence in self.sequences]

    @property
    def num_tokens(self) -> int:
        """Real tokens, padding not counted, a prompt once per completion."""
        return sum(self.lengths)

    def packed_tokens(self, token_budget: int) -> int:
        """Tokens that our micro-batches feed to the model: completions share prompts, and their last is not fed."""
        return sum(each.layout.num_tokens for each in pack(self.sequences, token_budget=token_budget))

    @property
    def num_loss_tokens(self) -> int:
        """Completion tokens."""
        return sum(int(sequence.loss_mask.sum()) for sequence in self.sequences)


def make_workload(lengths: Sequence[GroupLengths], config: RunConfig, *, vocab_size: int) -> Workload:
    """Random tokens, rewards that differ within every group, and mu uniform over the vocabulary."""
    source = np.random.default_rng(0)
    groups = tuple(_received(index, one, vocab_size, source) for index, one in enumerate(lengths))
    rewards_BG = torch.tensor(np.stack([received.group.rewards for received in groups]))
    confidence_BG = torch.tensor(np.stack([received.confidence_G for received in groups]))
    advantages_BG = estimate_advantages(rewards_BG, confidence_BG, config.objective.advantage)
    return Workload(groups, tuple(training_sequences(groups, advantages_BG)))


def _received(index: int, lengths: GroupLengths, vocab_size: int, source: np.random.Generator) -> ReceivedGroup:
    rollouts = tuple(
        Rollout(
            completion_ids=source.integers(vocab_size, size=length, dtype=np.int32),
            behavior_logprobs=np.full(length, -math.log(vocab_size)),
            version_spans=(VersionSpan(0, length),),
            finish_reason="stop",
            text="",
            reward=float(number % 2),
            reward_parts={"verifiable": float(number % 2)},
        )
        for number, length in enumerate(lengths.completions)
    )
    group = RolloutGroup(
        lease=Lease("train", index),
        prompt_ids=source.integers(vocab_size, size=lengths.prompt, dtype=np.int32),
        rollouts=rollouts,
        actor_id="bench",
        timing=Timing(started_at=0.0, generation_s=1.0, scoring_s=0.0),
    )
    descriptor = Descriptor("bench", index + 1, group.lease, 0, 0, 0.5)
    return ReceivedGroup(descriptor, group, source.standard_normal(len(rollouts)), 0)
