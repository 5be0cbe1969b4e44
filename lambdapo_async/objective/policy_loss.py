"""The policy loss: five knobs composed (docs/algorithm.md, section 2); the presets are values of them.

T = packed tokens of one micro-batch, N = its sequences. pi is the policy being trained (``logprobs``), mu the behavior
policy; rho = anchor / mu weights without gradient, r = pi / anchor is differentiated. Log-ratios, of tokens as of whole
sequences, are clamped to +-20 nats.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lambdapo_async.config.objective import RatioWeight, Rejection, Surrogate
from lambdapo_async.objective.extension import load_function
from lambdapo_async.objective.presets import PolicyLossSpec

MAX_LOG_RATIO = 20.0
"""Nats; exp of more says nothing but overflows."""

SurrogateFunction = Callable[[Tensor, Tensor, Tensor, Surrogate], tuple[Tensor, Tensor]]
"""ratio_T r with gradient, logprobs_T with gradient, advantages_T, config -> [T] what is maximised, and [T] bool where
clipping changed it. All are 0 (r is 1) where masked."""


@dataclass(frozen=True, slots=True)
class LossDenominator:
    """What the sum of a whole optimizer step is divided by: over all micro-batches and ranks, before rejection."""

    num_loss_tokens: int
    num_sequences: int
    max_tokens: int
    """Longest completion that sampling allows, for ``reduce = "constant"`` (Dr. GRPO, arXiv:2503.20783)."""

    def __post_init__(self) -> None:
        if min(self.num_loss_tokens, self.num_sequences, self.max_tokens) < 1:
            raise ValueError(f"nothing to divide by: {self}")


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """The loss of one micro-batch; losses and stats of micro-batches add up to the step's."""

    loss: Tensor
    """Scalar with gradient, already divided."""
    stats: dict[str, Tensor]
    """Loss tokens that were ``clipped``, ``truncated``, ``masked`` or ``rejected``, by the advantage's sign:
    scalars without gradient, such as ``clipped_pos``."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """Detached columns of the loss tokens; zeros elsewhere."""

    advantages_T: Tensor
    loss_mask_T: Tensor
    segment_ids_T: Tensor
    counts_N: Tensor
    """[T] of which the first N are the loss tokens of each sequence, at least 1."""

    def segment_sum(self, values_T: Tensor) -> Tensor:
        """[T] sum of ``values_T`` over the token's sequence; ``values_T`` is 0 where masked."""
        sums_N = values_T.new_zeros(len(self.counts_N)).index_add(0, self.segment_ids_T, values_T)
        return sums_N[self.segment_ids_T]

    def segment_mean(self, values_T: Tensor) -> Tensor:
        """[T] mean of ``values_T`` over the loss tokens of the token's sequence."""
        return self.segment_sum(values_T) / self.counts_N[self.segment_ids_T]


def policy_loss(  # noqa: PLR0913 - six columns of the same tokens
    logprobs_T: Tensor,
    behavior_logprobs_T: Tensor,
    anchor_logprobs_T: Tensor,
    advantages_T: Tensor,
    loss_mask_T: Tensor,
    segment_ids_T: Tensor,
    *,
    spec: PolicyLossSpec,
    denominator: LossDenominator,
) -> PolicyLoss:
    """Loss of one micro-batch, to be minimised.

    Args:
        logprobs_T: [T] float32 log pi with gradient; masked positions may hold anything, NaN included.
        behavior_logprobs_T: [T] float32 log mu; ignored where masked.
        anchor_logprobs_T: [T] float32, see ``anchor.anchor_of``; ignored where masked.
        advantages_T: [T] float32 A of the token's rollout.
        loss_mask_T: [T] bool, True for tokens that the policy produced.
        segment_ids_T: [T] int64 number of the token's sequence, 0..N-1; a sequence is never split.
        spec: the five knobs, a second-moment budget already solved for.
        denominator: counts of the whole optimizer update.
    """
    if spec.surrogate.second_moment is not None:
        raise ValueError("surrogate.second_moment is a budget of the whole update: call solve_trust_region first")
    # `where` before any arithmetic: NaN * 0 is NaN, and so is its gradient.
    logprobs_T, behavior_logprobs_T, anchor_logprobs_T, advantages_T = (
        torch.where(loss_mask_T, column_T, 0.0)
        for column_T in (logprobs_T, behavior_logprobs_T.detach(), anchor_logprobs_T.detach(), advantages_T.detach())
    )
    batch = _Batch(advantages_T, loss_mask_T, segment_ids_T, _counts(loss_mask_T, segment_ids_T))
    weight_T, outside_T = _importance_weight(anchor_logprobs_T - behavior_logprobs_T, batch, spec.weight)
    rejected_T = torch.zeros_like(loss_mask_T)
    for rejection in spec.reject:
        rejected_T = rejected_T | _rejected(logprobs_T.detach(), behavior_logprobs_T, batch, rejection)
    ratio_T = _ratio(logprobs_T - anchor_logprobs_T, batch, spec.surrogate.level)
    objective_T, clipped_T = surrogate_of(spec.surrogate)(ratio_T, logprobs_T, advantages_T, spec.surrogate)
    token_loss_T = torch.where(loss_mask_T & ~rejected_T, -weight_T * objective_T, 0.0)
    events = {
        "clipped": clipped_T,
        "truncated": outside_T if spec.weight.op == "truncate" else torch.zeros_like(outside_T),
        "masked": outside_T if spec.weight.op == "mask" else torch.zeros_like(outside_T),
        "rejected": rejected_T,
    }
    loss = reduce_tokens(token_loss_T, loss_mask_T, segment_ids_T, reduce=spec.reduce, denominator=denominator)
    return PolicyLoss(loss, _count_by_sign(events, batch))


def reduce_tokens(
    values_T: Tensor,
    loss_mask_T: Tensor,
    segment_ids_T: Tensor,
    *,
    reduce: Literal["token", "sequence", "constant"],
    denominator: LossDenominator,
) -> Tensor:
    """Scalar: this micro-batch's share of the update's mean of ``values_T``, which is 0 where masked."""
    match reduce:
        case "token":
            return values_T.sum() / denominator.num_loss_tokens
        case "sequence":
            counts_N = _counts(loss_mask_T, segment_ids_T)
            return (values_T / counts_N[segment_ids_T]).sum() / denominator.num_sequences
        case "constant":
            return values_T.sum() / (denominator.num_sequences * denominator.max_tokens)


def surrogate_of(surrogate: Surrogate) -> SurrogateFunction:
    """The function that ``kind`` names; ``ConfigError`` when it is the user's own and cannot be had."""
    if surrogate.kind in _SURROGATES:
        return _SURROGATES[surrogate.kind]
    return load_function(
        surrogate.kind,
        field="objective.policy_loss.surrogate.kind",
        parameters=("ratio_T", "logprobs_T", "advantages_T", "surrogate"),
    )


def _counts(loss_mask_T: Tensor, segment_ids_T: Tensor) -> Tensor:
    # As many as there are tokens, at most: their number lies on the device, which need not be waited for.
    counts_T = torch.zeros(len(segment_ids_T), device=loss_mask_T.device)
    return counts_T.index_add(0, segment_ids_T, loss_mask_T.float()).clamp(min=1.0)


def _ratio(log_ratio_T: Tensor, batch: _Batch, level: str) -> Tensor:
    """exp of the token's log-ratio, its sequence's sum, or its sequence's mean."""
    if level == "sequence":
        log_ratio_T = batch.segment_sum(log_ratio_T)
    elif level == "geo":
        log_ratio_T = batch.segment_mean(log_ratio_T)
    return log_ratio_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _importance_weight(log_rho_T: Tensor, batch: _Batch, weight: RatioWeight) -> tuple[Tensor, Tensor]:
    """[T] weight, and [T] bool where rho was outside its bounds."""
    rho_T = _ratio(log_rho_T, batch, weight.level)
    outside_T = (rho_T < weight.lo) | (rho_T > weight.hi)
    if weight.sign == "negative":
        applies_T = batch.advantages_T < 0
        rho_T, outside_T = torch.where(applies_T, rho_T, 1.0), outside_T & applies_T
    match weight.op:
        case "none":
            return rho_T, outside_T
        case "truncate":
            return torch.where(outside_T, rho_T.clamp(weight.lo, weight.hi), rho_T), outside_T
        case "mask":
            return torch.where(outside_T, 0.0, rho_T), outside_T


def _rejected(logprobs_T: Tensor, behavior_logprobs_T: Tensor, batch: _Batch, rejection: Rejection) -> Tensor:
    """[T] bool. Every statistic compares the policy being trained with the one that sampled: pi against mu."""
    log_ratio_T = logprobs_T - behavior_logprobs_T
    match rejection.statistic:
        case "token_ratio":
            statistic_T, moved_T = _ratio(log_ratio_T, batch, "token"), log_ratio_T
        case "token_prob_diff":
            statistic_T, moved_T = logprobs_T.exp() - behavior_logprobs_T.exp(), log_ratio_T
        case "seq_ratio":
            statistic_T, moved_T = _ratio(log_ratio_T, batch, "sequence"), batch.segment_sum(log_ratio_T)
        case "seq_geo":
            statistic_T, moved_T = _ratio(log_ratio_T, batch, "geo"), batch.segment_sum(log_ratio_T)
        case "seq_k3":
            k3_T = _ratio(log_ratio_T, batch, "token") - 1 - log_ratio_T
            statistic_T, moved_T = batch.segment_mean(k3_T), batch.segment_sum(log_ratio_T)
    outside_T = (statistic_T < rejection.lo) | (statistic_T > rejection.hi)
    match rejection.sign:
        case "any":
            return outside_T
        case "negative":
            return outside_T & (batch.advantages_T < 0)
        case "advantage":
            return outside_T & (batch.advantages_T * moved_T > 0)


def _clipped_ratio(
    ratio_T: Tensor, logprobs_T: Tensor, advantages_T: Tensor, surrogate: Surrogate
) -> tuple[Tensor, Tensor]:
    """min(r A, clip(r) A) bounds r on one side only: above for A >= 0, below (and dually above) for A < 0."""
    bounded_T = torch.where(
        advantages_T < 0,
        ratio_T.clamp(min=1 - surrogate.eps_lo, max=surrogate.dual),
        ratio_T.clamp(max=1 + surrogate.eps_hi),
    )
    return bounded_T * advantages_T, bounded_T != ratio_T


def _weighted_score(
    ratio_T: Tensor, logprobs_T: Tensor, advantages_T: Tensor, surrogate: Surrogate
) -> tuple[Tensor, Tensor]:
    """sg(clip(r)) A log pi: a clipped ratio scales the gradient and never stops it."""
    ratio_T = ratio_T.detach()
    bounded_T = ratio_T.clamp(1 - surrogate.eps_lo, 1 + surrogate.eps_hi)
    return bounded_T * advantages_T * logprobs_T, bounded_T != ratio_T


_SURROGATES: dict[str, SurrogateFunction] = {"ppo": _clipped_ratio, "score": _weighted_score}


def _count_by_sign(events: dict[str, Tensor], batch: _Batch) -> dict[str, Tensor]:
    """Loss tokens only: the advantage is 0, of neither sign, elsewhere."""
    signs = {"pos": batch.advantages_T > 0, "neg": batch.advantages_T < 0}
    return {
        f"{event}_{sign}": (happened_T & sign_T).sum()
        for event, happened_T in events.items()
        for sign, sign_T in signs.items()
    }
