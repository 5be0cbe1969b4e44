"""The policy in the denominator of r = pi / anchor. T = packed tokens of a micro-batch."""

import torch
from torch import Tensor

from lambdapo_async.objective.presets import PolicyLossSpec


def anchor_of(
    spec: PolicyLossSpec,
    logprobs_T: Tensor,
    behavior_logprobs_T: Tensor,
    proximal_logprobs_T: Tensor | None,
    alpha_T: Tensor,
) -> Tensor:
    """[T] log-probabilities under the anchor, without gradient.

    Args:
        spec: names the anchor.
        logprobs_T: [T] float32 log pi, now; the only one with a gradient.
        behavior_logprobs_T: [T] float32 log mu.
        proximal_logprobs_T: [T] float32 log pi at the step's start; None in the first update, where it is pi now.
        alpha_T: [T] float32, see :func:`version_alpha`.
    """
    logprobs_T = logprobs_T.detach()
    match spec.anchor:
        case "behavior":
            return behavior_logprobs_T
        case "latest":
            return logprobs_T
        case "proximal":
            return logprobs_T if proximal_logprobs_T is None else proximal_logprobs_T
        case "interpolated":
            return logprobs_T - (1 - alpha_T) * (logprobs_T - behavior_logprobs_T)


def version_alpha(token_versions_T: Tensor, *, version: int, progress: float) -> Tensor:
    """[T] float32 where the step's start lies on the line from mu (0) to pi (1), measured in versions.

    A-3PO (arXiv:2512.06547): log pi_a = log mu + alpha (log pi - log mu) with
    alpha = (v_proximal - v_mu) / (v_pi - v_mu). Our proximal policy is the step's start, so v_proximal = ``version``,
    and pi has moved on by ``progress`` of a version; the paper takes a whole one.

    Args:
        token_versions_T: [T] int64 version that sampled the token.
        version: the version that the step's updates start from.
        progress: share of the step's updates already taken, in [0, 1); at 0 pi is the proximal policy.
    """
    age_T = (version - token_versions_T).clamp(min=0).float()
    return age_T / (age_T + progress) if progress > 0 else torch.ones_like(age_T)
