"""A trust region as wide as a second-moment budget allows (M2PO, arXiv:2510.01161)."""

import math

import torch
from torch import Tensor

from lambdapo_async.config.objective import Surrogate
from lambdapo_async.objective.policy_loss import MAX_LOG_RATIO


def solve_trust_region(surrogate: Surrogate, log_ratio_K: Tensor, advantages_K: Tensor) -> Surrogate:
    """``surrogate`` with ``second_moment`` spent: the widest eps whose kept tokens average (log r)^2 within it.

    Tokens that moved outward (r > 1 with A > 0, r < 1 with A < 0) are the only ones that PPO's clip can stop, so they
    alone are averaged. Those with abs(log r) above a bound are stopped, and the bound is the largest one at which the
    mean over the outward tokens that remain keeps to the budget: as few tokens are stopped as possible.

    Args:
        surrogate: with a ``second_moment``.
        log_ratio_K: [K] log pi - log anchor of every loss token of one optimizer update, on all micro-batches.
        advantages_K: [K] A of the token's rollout.
    """
    budget = surrogate.second_moment
    if budget is None:
        return surrogate
    outward_M = log_ratio_K.double()[advantages_K * log_ratio_K > 0].abs()
    bound = _largest_bound(outward_M.clamp(max=MAX_LOG_RATIO), budget)
    return surrogate.model_copy(
        update={"eps_lo": -math.expm1(-bound), "eps_hi": math.expm1(bound), "second_moment": None}
    )


def _largest_bound(sizes_M: Tensor, budget: float) -> float:
    """Bound on abs(log r), in nats; infinite where nothing needs to be stopped.

    It lies half way between the last size that is kept and the first that is stopped, so that rounding in another
    forward pass moves no token across; equal sizes stay together.
    """
    sizes_M = sizes_M.sort().values
    counts_M = torch.arange(1, len(sizes_M) + 1, device=sizes_M.device)
    num_kept = int((sizes_M.square().cumsum(0) / counts_M <= budget).sum())  # prefix means never fall
    if num_kept == len(sizes_M):
        return math.inf
    stopped = float(sizes_M[num_kept])
    kept_M = sizes_M[sizes_M < stopped]
    return (stopped + (float(kept_M[-1]) if len(kept_M) else 0.0)) / 2
