"""One optimizer step: groups -> advantages -> packed micro-batches -> gradient -> new weights."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lambdapo_async.config import RunConfig
from lambdapo_async.objective.advantage import estimate_advantages
from lambdapo_async.objective.diagnostics import TokenDiagnostics, group_diagnostics
from lambdapo_async.objective.policy_loss import LossDenominator, PolicyLoss, anchor_of, policy_loss
from lambdapo_async.objective.presets import resolve_policy_loss
from lambdapo_async.packing import MicroBatch, TrainingSequence, pack
from learner.ingest import ReceivedGroup
from learner.policy import Policy


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step did, as numbers with stable names."""

    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class _Minibatch:
    """What one optimizer update is made of."""

    micro_batches: tuple[MicroBatch, ...]
    proximal: tuple[Tensor | None, ...]
    """Per micro-batch [T] log pi at the step's start; None where the newest policy is the proximal one."""
    denominator: LossDenominator


class Trainer:
    """Trains a policy on the groups of one step at a time."""

    def __init__(self, policy: Policy, config: RunConfig) -> None:
        self._policy, self._config = policy, config
        self._spec = resolve_policy_loss(config.objective.policy_loss)

    def step(self, groups: Sequence[ReceivedGroup], *, version: int) -> StepResult:
        """Take ``learner.minibatches`` optimizer updates from ``groups``.

        Args:
            groups: all with the same number of rollouts.
            version: the policy version that these updates start from.
        """
        rewards_BG = torch.tensor(np.stack([received.group.rewards for received in groups]))
        confidence_BG = torch.tensor(np.stack([received.confidence_G for received in groups]))
        advantages_BG = estimate_advantages(rewards_BG, confidence_BG, self._config.objective.advantage)
        diagnostics = TokenDiagnostics()
        sums: Counter[str] = Counter()
        lr, grad_norms = self._policy.lr, []
        for minibatch in self._minibatches(groups, advantages_BG):
            for micro_batch, proximal_T in zip(minibatch.micro_batches, minibatch.proximal, strict=True):
                sums.update(self._backward(micro_batch, proximal_T, minibatch.denominator, diagnostics, version))
            grad_norms.append(self._policy.step())
        metrics = {
            **_loss_metrics(sums, len(grad_norms)),
            **diagnostics.finalise(),
            **group_diagnostics(rewards_BG, confidence_BG, advantages_BG),
            "optim/grad_norm": max(grad_norms),
            "optim/lr": lr,
            "optim/skipped": float(self._policy.num_skipped),
        }
        return StepResult(metrics)

    def _minibatches(self, groups: Sequence[ReceivedGroup], advantages_BG: Tensor) -> list[_Minibatch]:
        """Split by whole groups; anchors are computed for all of them before the first update."""
        parts = np.array_split(np.arange(len(groups)), self._config.learner.minibatches)
        return [self._minibatch([groups[i] for i in part], advantages_BG[part]) for part in parts]

    def _minibatch(self, groups: Sequence[ReceivedGroup], advantages_BG: Tensor) -> _Minibatch:
        sequences = training_sequences(groups, advantages_BG)
        micro_batches = tuple(
            micro_batch.to(self._policy.device)
            for micro_batch in pack(sequences, token_budget=self._config.learner.micro_batch_tokens)
        )
        # With one update the proximal policy is the newest one: no extra forward pass.
        needs_proximal = self._spec.anchor == "proximal" and self._config.learner.minibatches > 1
        proximal = tuple(self._policy.logprobs(mb) if needs_proximal else None for mb in micro_batches)
        denominator = LossDenominator(
            num_loss_tokens=sum(int(sequence.loss_mask.sum()) for sequence in sequences),
            num_sequences=len(sequences),
            max_tokens=self._config.sampling.max_tokens,
        )
        return _Minibatch(micro_batches, proximal, denominator)

    def _backward(
        self,
        micro_batch: MicroBatch,
        proximal_T: Tensor | None,
        denominator: LossDenominator,
        diagnostics: TokenDiagnostics,
        version: int,
    ) -> dict[str, float]:
        """Add one micro-batch's gradient; returns the sums to report."""
        outcome: list[PolicyLoss] = []

        def loss_of(logprobs_T: Tensor) -> Tensor:
            result = policy_loss(
                logprobs_T,
                micro_batch.behavior_logprobs_T,
                anchor_of(self._spec, logprobs_T, micro_batch.behavior_logprobs_T, proximal_T),
                micro_batch.advantages_T,
                micro_batch.loss_mask_T,
                micro_batch.segment_ids_T,
                spec=self._spec,
                denominator=denominator,
            )
            outcome.append(result)
            return result.loss

        statistics = self._policy.backward(micro_batch, loss_of)
        diagnostics.add(
            statistics.logprobs_T,
            micro_batch.behavior_logprobs_T,
            micro_batch.loss_mask_T,
            micro_batch.segment_ids_T,
            micro_batch.token_versions_T == version,
        )
        sums = {name: float(value) for name, value in outcome[0].stats.items()}
        return {
            **sums,
            "loss": float(outcome[0].loss.detach()),
            "entropy": float(statistics.entropy_T[micro_batch.loss_mask_T].sum()),
            "tokens": float(micro_batch.loss_mask_T.sum()),
        }


def training_sequences(groups: Sequence[ReceivedGroup], advantages_BG: Tensor) -> list[TrainingSequence]:
    """One sequence per rollout: prompt and completion, with every column aligned to its own token."""
    return [
        _training_sequence(received, rollout_index, float(advantages_BG[group_index, rollout_index]))
        for group_index, received in enumerate(groups)
        for rollout_index in range(len(received.group.rollouts))
    ]


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


def _loss_metrics(sums: Counter[str], num_updates: int) -> dict[str, float]:
    """Sums over the step -> ``loss/policy`` per update, ``policy/entropy`` per token, shares of tokens."""
    tokens = max(sums.pop("tokens"), 1.0)
    loss, entropy = sums.pop("loss"), sums.pop("entropy")
    shares = {f"ratio/{name}": value / tokens for name, value in sums.items()}
    return {"loss/policy": loss / num_updates, "policy/entropy": entropy / tokens, **shares}
