"""Group-relative advantages (docs/algorithm.md, section 1).

B = groups, G = rollouts of a group; R_i reward and s_i confidence of rollout i. By default an advantage is a pure
function of the stored group; with ``confidence_policy = "proximal"`` s comes from the policy at the step's start. None
carries a gradient.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lambdapo_async.config.objective import AdvantageConfig
from lambdapo_async.errors import ConfigError
from lambdapo_async.objective.extension import load_function

CONFIDENCE_STD_FLOOR = 1e-3
"""Nats per token: mean log-probabilities closer than this are equally confident, not standardised noise."""

_STD_FLOOR = 1e-6

Estimator = Callable[[Tensor, Tensor, AdvantageConfig], Tensor]
"""rewards_BG, confidence_BG, config -> advantages_BG, before std_norm, center and shift."""


def estimate_advantages(rewards_BG: Tensor, confidence_BG: Tensor, config: AdvantageConfig) -> Tensor:
    """Advantage of every rollout; exactly 0 in groups without reward variance and in groups of one.

    Args:
        rewards_BG: [B, G] float64 R.
        confidence_BG: [B, G] float64 s, see :func:`group_confidence`; only estimator ``lambda`` reads it.
        config: estimator and controls, applied in the order std_norm, center, shift.

    Returns:
        [B, G] float64.
    """
    if rewards_BG.ndim != 2 or rewards_BG.shape != confidence_BG.shape:
        raise ValueError(
            f"rewards {tuple(rewards_BG.shape)} and confidence {tuple(confidence_BG.shape)} must share one shape [B, G]"
        )
    if rewards_BG.numel() == 0 or rewards_BG.shape[1] < 2:
        return torch.zeros_like(rewards_BG)
    advantages_BG = estimator_of(config)(rewards_BG, confidence_BG, config)
    if advantages_BG.shape != rewards_BG.shape:
        raise ConfigError(
            f"objective.advantage.estimator = {config.estimator!r} made advantages {tuple(advantages_BG.shape)} of "
            f"rewards {tuple(rewards_BG.shape)}: it must keep the shape"
        )
    if config.std_norm or config.estimator == "grpo":
        advantages_BG = advantages_BG / rewards_BG.std(dim=1, keepdim=True).clamp(min=_STD_FLOOR)
    if config.center:
        advantages_BG = advantages_BG - advantages_BG.mean(dim=1, keepdim=True)
    # Without variance there is no preference to learn: neither rounding nor the shift may invent one.
    varied_B1 = rewards_BG.amax(dim=1, keepdim=True) > rewards_BG.amin(dim=1, keepdim=True)
    return torch.where(varied_B1, advantages_BG + config.shift, 0.0)


def estimator_of(config: AdvantageConfig) -> Estimator:
    """The function that ``config`` names; ``ConfigError`` when it is the user's own and cannot be had."""
    if config.estimator in _ESTIMATORS:
        return _ESTIMATORS[config.estimator]
    return load_function(
        config.estimator,
        field="objective.advantage.estimator",
        parameters=("rewards_BG", "confidence_BG", "config"),
    )


def group_confidence(
    logprobs: Sequence[NDArray[np.float32]], kind: Literal["z", "mean", "sum"]
) -> tuple[NDArray[np.float64], int]:
    """Confidence s_i of each rollout of one group.

    Args:
        logprobs: per rollout [C_i] float32 log-probability of its tokens, as the behavior policy recorded it.
        kind: ``z``: mean token log-probability standardised in the group (the default: sums saturate the sigmoid
            at thousands of tokens, means make it nearly uniform); ``mean`` and ``sum`` in nats.

    Returns:
        [G] float64 s, and how many rollouts had no token or a non-finite log-probability: those get the mean of
        the others (0 when there are none).
    """
    reduce = np.sum if kind == "sum" else np.mean
    usable_G = np.array([len(column) > 0 and np.isfinite(column).all() for column in logprobs])
    confidence_G = np.zeros(len(logprobs))
    for index in np.flatnonzero(usable_G):
        confidence_G[index] = reduce(logprobs[index], dtype=np.float64)
    num_missing = int((~usable_G).sum())
    if not usable_G.any():
        return confidence_G, num_missing
    usable = confidence_G[usable_G]
    confidence_G[~usable_G] = usable.mean()
    if kind == "z":
        confidence_G = (confidence_G - usable.mean()) / max(float(usable.std()), CONFIDENCE_STD_FLOOR)
    return confidence_G, num_missing


def _lambda(rewards_BG: Tensor, confidence_BG: Tensor, config: AdvantageConfig) -> Tensor:
    """A_i = 1/(G-1) sum_{j != i} w_ij (R_i - R_j): LambdaPO in the form we read it (arXiv:2605.19416, 2605.21235)."""
    reward_gaps_BGG = rewards_BG[:, :, None] - rewards_BG[:, None, :]
    confidence_gaps_BGG = (confidence_BG[:, :, None] - confidence_BG[:, None, :]) / config.tau
    weights_BGG = _pair_weights(reward_gaps_BGG, confidence_gaps_BGG, config.weight)
    return (weights_BGG * reward_gaps_BGG).sum(dim=2) / (rewards_BG.shape[1] - 1)


def _pair_weights(
    reward_gaps_BGG: Tensor, confidence_gaps_BGG: Tensor, weight: Literal["own", "rank", "agree", "uniform"]
) -> Tensor:
    """w_ij in [0, 2]; the factor 2 makes tau -> infinity exactly ``uniform``, which is RLOO."""
    match weight:
        case "own":
            return 2 * torch.sigmoid(confidence_gaps_BGG)
        case "rank":  # LambdaRank (Burges 2010, MSR-TR-2010-82)
            return 2 * torch.sigmoid(-reward_gaps_BGG.sign() * confidence_gaps_BGG)
        case "agree":
            return 2 * torch.sigmoid(reward_gaps_BGG.sign() * confidence_gaps_BGG)
        case "uniform":
            return torch.ones_like(reward_gaps_BGG)


def _rloo(rewards_BG: Tensor, confidence_BG: Tensor, config: AdvantageConfig) -> Tensor:
    """Reward minus the mean of the others (arXiv:2402.14740)."""
    group_size = rewards_BG.shape[1]
    return _centred(rewards_BG, confidence_BG, config) * (group_size / (group_size - 1))


def _centred(rewards_BG: Tensor, confidence_BG: Tensor, config: AdvantageConfig) -> Tensor:
    """Reward minus the group's mean: Dr. GRPO (arXiv:2503.20783), and GRPO (arXiv:2402.03300) before its division."""
    return rewards_BG - rewards_BG.mean(dim=1, keepdim=True)


def _reinforce_pp(rewards_BG: Tensor, confidence_BG: Tensor, config: AdvantageConfig) -> Tensor:
    """Group mean as the baseline, standard deviation of the whole batch (REINFORCE++-baseline, arXiv:2501.03262)."""
    centred_BG = _centred(rewards_BG, confidence_BG, config)
    return centred_BG / centred_BG.std().clamp(min=_STD_FLOOR)


_ESTIMATORS: dict[str, Estimator] = {
    "lambda": _lambda,
    "rloo": _rloo,
    "grpo": _centred,
    "dr_grpo": _centred,
    "reinforce_pp": _reinforce_pp,
}
