"""The solved trust region: within its budget, as wide as can be, and no wider for PPO's clip than it says."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lambdapo_async.config.objective import Surrogate
from lambdapo_async.objective.second_moment import solve_trust_region

# Multiples of 1/8 make ties frequent.
columns = st.lists(st.tuples(st.integers(-16, 16).map(lambda n: n / 8), st.sampled_from([-1.0, 0.5])), max_size=12)
budgets = st.sampled_from([0.01, 0.04, 0.5, 2.0])


def solved(log_ratios: list[float], advantages: list[float], budget: float) -> Surrogate:
    surrogate = Surrogate(second_moment=budget, dual=3.0)
    return solve_trust_region(surrogate, torch.tensor(log_ratios), torch.tensor(advantages))


def kept(log_ratio_K: Tensor, advantages_K: Tensor, surrogate: Surrogate) -> Tensor:
    """[K] bool: what PPO's clip lets through."""
    ratio_K = log_ratio_K.exp()
    stopped = ((advantages_K > 0) & (ratio_K > 1 + surrogate.eps_hi)) | (
        (advantages_K < 0) & (ratio_K < 1 - surrogate.eps_lo)
    )
    return ~stopped


@settings(max_examples=60, deadline=None)
@given(columns, budgets)
def test_it_keeps_as_much_as_the_budget_allows(tokens: list[tuple[float, float]], budget: float) -> None:
    log_ratio_K, advantages_K = (torch.tensor([token[side] for token in tokens]) for side in (0, 1))
    surrogate = solve_trust_region(Surrogate(second_moment=budget), log_ratio_K, advantages_K)
    outward_K = log_ratio_K * advantages_K > 0
    kept_K = kept(log_ratio_K, advantages_K, surrogate)
    assert kept_K[~outward_K].all()
    inside = log_ratio_K[outward_K & kept_K].square()
    assert inside.numel() == 0 or inside.mean() <= budget * (1 + 1e-6)
    stopped = log_ratio_K[outward_K & ~kept_K].abs()
    if stopped.numel():
        one_more = log_ratio_K[outward_K & (log_ratio_K.abs() <= stopped.min())].square()
        assert one_more.mean() > budget * (1 - 1e-6)


def test_by_hand() -> None:
    """Squares 0.01, 0.04, 0.09 average 0.0467: the last goes, and the bound lies between 0.2 and 0.3.

    What did not move is not outward, else three zeros would pay for it.
    """
    surrogate = solved([0.1, -0.2, 0.3, -5.0, *[0.0] * 3], [1.0, -1.0, 1.0, 1.0, *[1.0] * 3], 0.04)
    assert surrogate.eps_hi == pytest.approx(math.exp(0.25) - 1)
    assert surrogate.eps_lo == pytest.approx(1 - math.exp(-0.25))
    assert (surrogate.second_moment, surrogate.dual) == (None, 3.0)


def test_within_budget_nothing_is_clipped() -> None:
    for log_ratios, budget in (([0.1, -0.1], 0.04), ([], 0.04), ([-5.0, -4.0], 0.04), ([0.5], 0.25)):
        surrogate = solved(log_ratios, [1.0] * len(log_ratios), budget)
        assert (surrogate.eps_hi, surrogate.eps_lo) == (math.inf, 1.0)


def test_when_even_the_smallest_is_too_far_everything_outward_is_stopped() -> None:
    surrogate = solved([2.0, 3.0], [1.0, 1.0], 0.04)
    assert surrogate.eps_hi == pytest.approx(math.e - 1)
    assert not kept(torch.tensor([2.0, 3.0]), torch.ones(2), surrogate).any()


def test_without_a_budget_it_is_the_surrogate_itself() -> None:
    surrogate = Surrogate(eps_hi=0.3)
    assert solve_trust_region(surrogate, torch.ones(2), torch.ones(2)) is surrogate


def test_sizes_end_where_the_loss_clamps_them() -> None:
    surrogate = solved([0.1, 3e4, 1e30], [1.0, 1.0, 1.0], 0.04)
    assert surrogate.eps_hi == pytest.approx(math.expm1((0.1 + 20.0) / 2))
