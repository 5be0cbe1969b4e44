"""Optional terms beside the policy loss: KL to a frozen reference and an entropy bonus (docs/algorithm.md, section 2).

T = packed tokens of one micro-batch. Both are divided by the denominator of the whole step, as the policy loss is.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lambdapo_async.config.objective import ObjectiveConfig
from lambdapo_async.objective.policy_loss import MAX_LOG_RATIO, LossDenominator, reduce_tokens


@dataclass(frozen=True, slots=True)
class Regularisation:
    """The terms of one micro-batch; those of micro-batches add up to the step's."""

    loss: Tensor
    """Scalar, already weighted and divided; to be added to the policy loss."""
    kl: Tensor | None
    """Sum over loss tokens of the estimated KL(pi || reference), in nats, without gradient; None without a term."""


def regularisation(  # noqa: PLR0913 - four columns of the same tokens
    logprobs_T: Tensor,
    entropy_T: Tensor,
    reference_logprobs_T: Tensor | None,
    loss_mask_T: Tensor,
    segment_ids_T: Tensor,
    *,
    config: ObjectiveConfig,
    reduce: Literal["token", "sequence", "constant"],
    denominator: LossDenominator,
) -> Regularisation:
    """Loss terms of one micro-batch; masked positions may hold anything, NaN included.

    Args:
        logprobs_T: [T] float32 log pi with gradient.
        entropy_T: [T] float32 entropy of the next token in nats, with gradient.
        reference_logprobs_T: [T] float32 log-probabilities under the frozen reference, without gradient; needed with a
            KL coefficient.
        loss_mask_T: [T] bool.
        segment_ids_T: [T] int64 number of the token's sequence.
        config: the coefficients; a term whose coefficient is 0 is not computed.
        reduce: as in the policy loss.
        denominator: counts of the whole optimizer update.
    """
    terms_T, kl = torch.zeros_like(logprobs_T), None
    if config.kl.coefficient > 0:
        if reference_logprobs_T is None:
            raise ValueError("objective.kl.coefficient > 0 needs the reference's log-probabilities")
        kl_T = kl_estimate(logprobs_T, reference_logprobs_T, loss_mask_T, estimator=config.kl.estimator)
        terms_T, kl = terms_T + config.kl.coefficient * kl_T, kl_T.detach().sum()
    if config.entropy_coefficient > 0:
        terms_T = terms_T - config.entropy_coefficient * torch.where(loss_mask_T, entropy_T, 0.0)
    loss = reduce_tokens(terms_T, loss_mask_T, segment_ids_T, reduce=reduce, denominator=denominator)
    return Regularisation(loss, kl)


def kl_estimate(
    logprobs_T: Tensor, reference_logprobs_T: Tensor, loss_mask_T: Tensor, *, estimator: Literal["k1", "k2", "k3"]
) -> Tensor:
    """[T] KL(pi || reference) of each token's position, 0 where masked (Schulman 2020, "Approximating KL divergence").

    With d = log pi - log reference: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. The gradient of k1 taken literally has
    expectation 0, so k1 carries the gradient d * grad log pi, REINFORCE's for a penalty d in the reward; k2's is the
    same (arXiv:2510.01555).
    """
    delta_T = torch.where(loss_mask_T, logprobs_T, 0.0) - torch.where(loss_mask_T, reference_logprobs_T, 0.0)
    match estimator:
        case "k1":
            return delta_T.detach() * (1 + delta_T - delta_T.detach())
        case "k2":
            return delta_T.square() / 2
        case "k3":
            return torch.exp((-delta_T).clamp(max=MAX_LOG_RATIO)) - 1 + delta_T
