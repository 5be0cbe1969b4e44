"""One step: groups -> advantages -> packed micro-batches -> gradient -> new weights, once or several times."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lambdapo_async.config import RunConfig
from lambdapo_async.fleet_health import FreshTokens, mismatch_metrics
from lambdapo_async.objective.advantage import estimate_advantages
from lambdapo_async.objective.anchor import anchor_of, version_alpha
from lambdapo_async.objective.diagnostics import density_diagnostics, group_diagnostics
from lambdapo_async.objective.policy_loss import LossDenominator, PolicyLoss, policy_loss
from lambdapo_async.objective.presets import PolicyLossSpec
from lambdapo_async.objective.regularisation import Regularisation, regularisation
from lambdapo_async.objective.resolve import resolve_objective
from lambdapo_async.objective.second_moment import solve_trust_region
from lambdapo_async.packing import MicroBatch
from learner.arrivals import ReceivedGroup
from learner.parallel import ALONE, Ranks
from learner.policy import Policy, TokenStatistics
from learner.sequences import proximal_confidence, rank_shares, training_sequences
from learner.step_tally import StepTally

ReferenceLogprobs = Callable[[MicroBatch], Tensor]
"""Micro-batch on the policy's device -> [T] float32 log-probabilities under a frozen reference, without gradient; what
it says where there is no loss is ignored."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step did, as numbers with stable names."""

    metrics: dict[str, float]
    fresh_by_group: tuple[FreshTokens, ...]
    """Of each group, in order."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """A micro-batch and what is known of it before the step's first update."""

    columns: MicroBatch
    proximal_T: Tensor | None
    """[T] log pi at the step's start; None where the loss does not read it, or pi is still that policy."""
    reference_T: Tensor | None
    """[T] log-probabilities under the reference; None without a KL term."""


@dataclass(frozen=True, slots=True)
class _Minibatch:
    """What one optimizer update is made of."""

    batches: tuple[_Batch, ...]
    """This rank's share."""
    denominator: LossDenominator
    """Of all shares' tokens."""


@dataclass(frozen=True, slots=True)
class _Moment:
    """When an update happens."""

    version: int
    """The version that the step started from."""
    progress: float
    """Share of the step's updates already taken, in [0, 1)."""
    is_first_pass: bool
    """Over the step's groups."""


class Trainer:
    """Trains a policy on the groups of one step at a time.

    With several ranks each trains on its share of the same groups, or a share's ranks on a part of each sequence; all
    report the metrics of the whole.

    Args:
        policy: trained in place.
        config: a dotted path in its objective is imported here.
        reference: needed with ``objective.kl.coefficient`` > 0.

    Raises:
        ConfigError: a dotted path that cannot be imported, or several updates from one batch without a trust region.
    """

    def __init__(
        self, policy: Policy, config: RunConfig, reference: ReferenceLogprobs | None = None, ranks: Ranks = ALONE
    ) -> None:
        if config.objective.kl.coefficient > 0 and reference is None:
            raise ValueError("objective.kl.coefficient > 0 needs a reference policy")
        self._policy, self._config, self._ranks = policy, config, ranks
        self._reference = reference if config.objective.kl.coefficient > 0 else None
        self._spec = resolve_objective(config)
        self._num_updates = config.learner.minibatches * config.learner.epochs

    def step(self, groups: Sequence[ReceivedGroup], *, version: int) -> StepResult:
        """Take ``learner.minibatches`` optimizer updates from ``groups``, ``learner.epochs`` times over.

        Args:
            groups: all with the same number of rollouts.
            version: the policy version that these updates start from.
        """
        rewards_BG = torch.tensor(np.stack([received.group.rewards for received in groups]))
        confidence_BG = self._confidence(groups)
        advantages_BG = estimate_advantages(rewards_BG, confidence_BG, self._config.objective.advantage)
        numbers = {received.group.lease.id: number for number, received in enumerate(groups)}
        lr, tally = self._policy.lr, StepTally(group_numbers=numbers, keeps_contexts=self._config.actor.stale_kv)
        minibatches = self._minibatches(groups, advantages_BG) * self._config.learner.epochs
        for number, minibatch in enumerate(minibatches):
            is_first_pass = number < self._config.learner.minibatches
            self._update(minibatch, _Moment(version, number / self._num_updates, is_first_pass), tally)
        fresh = tally.fresh_by_group(self._ranks)
        metrics = {
            **self._loss_metrics(tally),
            **tally.token_metrics(self._ranks),
            **mismatch_metrics(fresh, num_tokens=sum(received.group.num_completion_tokens for received in groups)),
            **group_diagnostics(rewards_BG, confidence_BG, advantages_BG),
            **_density_metrics(groups),
            "optim/grad_norm": float(np.max(tally.grad_norms)),  # NaN if one is
            "optim/lr": lr,
            "optim/skipped": float(self._policy.num_skipped),
        }
        return StepResult(metrics, fresh)

    def _confidence(self, groups: Sequence[ReceivedGroup]) -> Tensor:
        """[B, G] float64 s."""
        if self._config.objective.advantage.confidence_policy == "proximal":
            return torch.tensor(proximal_confidence(self._policy, groups, self._config, self._ranks))
        return torch.tensor(np.stack([received.confidence_G for received in groups]))

    def _minibatches(self, groups: Sequence[ReceivedGroup], advantages_BG: Tensor) -> list[_Minibatch]:
        """Split by whole groups; anchors are computed for all of them before the first update."""
        parts = np.array_split(np.arange(len(groups)), self._config.learner.minibatches)
        return [self._minibatch([groups[i] for i in part], advantages_BG[part]) for part in parts]

    def _minibatch(self, groups: Sequence[ReceivedGroup], advantages_BG: Tensor) -> _Minibatch:
        sequences = training_sequences(groups, advantages_BG)
        budget = self._config.learner.micro_batch_tokens
        shares = rank_shares(sequences, token_budget=budget, num_shares=self._ranks.num_shares)
        denominator = LossDenominator(
            # Where no completion has a token the gradient is 0, whatever it is divided by.
            num_loss_tokens=max(1, sum(int(sequence.loss_mask.sum()) for sequence in sequences)),
            num_sequences=len(sequences),
            max_tokens=self._config.sampling.max_tokens,
        )
        return _Minibatch(tuple(self._batch(each) for each in shares[self._ranks.share_index]), denominator)

    def _batch(self, micro_batch: MicroBatch) -> _Batch:
        columns = micro_batch.to(self._policy.device)
        # With one update the proximal policy is the newest one: no extra forward pass.
        needs_proximal = self._spec.anchor == "proximal" and self._num_updates > 1
        return _Batch(
            columns,
            proximal_T=self._policy.logprobs(columns) if needs_proximal else None,
            reference_T=None if self._reference is None else self._reference(columns).detach(),
        )

    def _update(self, minibatch: _Minibatch, moment: _Moment, tally: StepTally) -> None:
        """One optimizer update."""
        spec = self._solved(minibatch, moment)
        costs_RX = self._policy.expert_costs([batch.columns for batch in minibatch.batches])
        for batch in minibatch.batches:
            self._backward(batch, minibatch.denominator, spec, moment, tally, costs_RX)
        tally.grad_norms.append(self._policy.step())

    def _solved(self, minibatch: _Minibatch, moment: _Moment) -> PolicyLossSpec:
        """The spec with its second-moment budget spent on the whole update, by one forward pass; most have none."""
        if self._spec.surrogate.second_moment is None:
            return self._spec
        log_ratios, advantages = [], []
        for batch in minibatch.batches:
            mask_T = batch.columns.loss_mask_T
            logprobs_T = self._policy.logprobs(batch.columns)
            log_ratios.append((logprobs_T - self._anchor(batch, logprobs_T, moment))[mask_T])
            advantages.append(batch.columns.advantages_T[mask_T])
        collected = self._ranks.collect([torch.cat(log_ratios).float(), torch.cat(advantages)])
        log_ratio_K, advantages_K = (torch.cat(parts) for parts in zip(*collected, strict=True))
        surrogate = solve_trust_region(self._spec.surrogate, log_ratio_K, advantages_K)
        return replace(self._spec, surrogate=surrogate)

    def _anchor(self, batch: _Batch, logprobs_T: Tensor, moment: _Moment) -> Tensor:
        columns = batch.columns
        alpha_T = version_alpha(columns.token_versions_T, version=moment.version, progress=moment.progress)
        return anchor_of(self._spec, logprobs_T, columns.behavior_logprobs_T, batch.proximal_T, alpha_T)

    def _backward(
        self,
        batch: _Batch,
        denominator: LossDenominator,
        spec: PolicyLossSpec,
        moment: _Moment,
        tally: StepTally,
        costs_RX: Tensor | None,
    ) -> None:
        """Add one micro-batch's gradient, and what is to be reported of it."""
        columns = batch.columns
        outcome: list[tuple[PolicyLoss, Regularisation]] = []

        def loss_of(logprobs_T: Tensor, entropy_T: Tensor) -> Tensor:
            policy = policy_loss(
                logprobs_T,
                columns.behavior_logprobs_T,
                self._anchor(batch, logprobs_T, moment),
                columns.advantages_T,
                columns.loss_mask_T,
                columns.segment_ids_T,
                spec=spec,
                denominator=denominator,
            )
            extra = regularisation(
                logprobs_T,
                entropy_T,
                batch.reference_T,
                columns.loss_mask_T,
                columns.segment_ids_T,
                config=self._config.objective,
                reduce=spec.reduce,
                denominator=denominator,
            )
            outcome.append((policy, extra))
            return policy.loss + extra.loss

        statistics = self._policy.backward(columns, loss_of, costs_RX)
        tally.add(_sums_of(*outcome[0], statistics.entropy_T, columns))
        start_T = _start_logprobs(batch, statistics, moment)
        tally.count(statistics, columns, version=moment.version, start_logprobs_T=start_T)

    def _loss_metrics(self, tally: StepTally) -> dict[str, float]:
        """Sums over the step and the shares -> losses per update, entropy and KL per token, shares of tokens."""
        sums = tally.sums(self._ranks)
        num_updates, tokens = len(tally.grad_norms), max(sums["tokens"], 1.0)
        metrics = {"loss/policy": sums["loss"] / num_updates, "policy/entropy": sums["entropy"] / tokens}
        if sums["regularisation"] != 0:
            metrics["loss/regularisation"] = sums["regularisation"] / num_updates
        if "kl" in sums:
            metrics["kl/reference"] = sums["kl"] / tokens
        shares = {name: value / tokens for name, value in sums.items() if name.startswith("event/")}
        return {**metrics, **{name.replace("event/", "ratio/"): share for name, share in shares.items()}}


def _start_logprobs(batch: _Batch, statistics: TokenStatistics, moment: _Moment) -> Tensor | None:
    """[T] log pi of the step's start, once for each micro-batch; None where nobody computed it."""
    if moment.progress == 0:
        return statistics.logprobs_T
    return batch.proximal_T if moment.is_first_pass else None


def _sums_of(policy: PolicyLoss, extra: Regularisation, entropy_T: Tensor, columns: MicroBatch) -> dict[str, Tensor]:
    """What one micro-batch adds to the step's metrics; events by sign under their own names."""
    sums = {f"event/{name}": value for name, value in policy.stats.items()}
    if extra.kl is not None:
        sums["kl"] = extra.kl
    return {
        **sums,
        "loss": policy.loss,
        "regularisation": extra.loss,
        "entropy": entropy_T.index_select(0, columns.loss_indices()).sum(),
        "tokens": columns.loss_mask_T.sum(),
    }


def _density_metrics(groups: Sequence[ReceivedGroup]) -> dict[str, float]:
    parts = [rollout.reward_parts for received in groups for rollout in received.group.rollouts]
    dense = [each for each in parts if "density" in each]
    return density_diagnostics([each["verifiable"] for each in dense], [each["density"] for each in dense])
