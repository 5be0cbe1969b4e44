"""Lambda advantages against a slow oracle, autograd and the properties of docs/algorithm.md, section 1."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lambdapo_async.config.objective import AdvantageConfig
from lambdapo_async.objective.advantage import estimate_advantages, group_confidence
from tests.reference import advantage as reference

WEIGHTS = ("own", "rank", "agree", "uniform")
ESTIMATORS = ("lambda", "rloo", "grpo", "dr_grpo", "reinforce_pp")

weights = st.sampled_from(WEIGHTS)
# Multiples of 1/8 make sums exact and ties frequent.
eighths = st.integers(-16, 16).map(lambda n: n / 8)
groups = st.integers(2, 7).flatmap(
    lambda size: st.tuples(
        st.lists(eighths, min_size=size, max_size=size), st.lists(eighths, min_size=size, max_size=size)
    )
)


def one(rewards: list[float], confidence: list[float], **settings: object) -> Tensor:
    """[G] advantages of one group."""
    config = AdvantageConfig(**settings)
    return estimate_advantages(
        torch.tensor([rewards], dtype=torch.float64), torch.tensor([confidence], dtype=torch.float64), config
    )[0]


def assert_close(actual: Tensor, expected: Tensor | list[float]) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-10)


@settings(deadline=None)
@given(groups, weights, st.sampled_from([0.25, 1.0, 3.0]))
def test_equals_the_slow_sum(group: tuple[list[float], list[float]], weight: str, tau: float) -> None:
    rewards, confidence = group
    expected = reference.lambda_advantages(rewards, confidence, weight=weight, tau=tau)
    assert_close(one(rewards, confidence, weight=weight, tau=tau), expected)


def test_equals_a_sum_by_hand() -> None:
    advantages = one([1.0, 0.0], [math.log(3), 0.0], weight="own")
    assert_close(advantages, [2 * 0.75 * 1.0, 2 * 0.25 * -1.0])


@settings(deadline=None)
@given(groups, weights, st.randoms(use_true_random=False))
def test_permutation_equivariance(group: tuple[list[float], list[float]], weight: str, random: object) -> None:
    rewards, confidence = group
    order = list(range(len(rewards)))
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = one([rewards[i] for i in order], [confidence[i] for i in order], weight=weight)
    assert_close(shuffled, one(rewards, confidence, weight=weight)[order])


@settings(deadline=None)
@given(groups, weights, eighths, eighths, st.sampled_from([0.5, 2.0, 10.0]))
def test_invariances(group: tuple[list[float], list[float]], weight: str, c: float, d: float, scale: float) -> None:
    rewards, confidence = group
    plain = one(rewards, confidence, weight=weight)
    assert_close(one([r + c for r in rewards], [s + d for s in confidence], weight=weight), plain)
    assert_close(one([scale * r for r in rewards], confidence, weight=weight), scale * plain)


@settings(deadline=None)
@given(groups, st.sampled_from(ESTIMATORS), weights, eighths, st.booleans(), st.booleans())
def test_equal_rewards_give_exactly_zero(
    group: tuple[list[float], list[float]], estimator: str, weight: str, shift: float, center: bool, std_norm: bool
) -> None:
    confidence = group[1]
    rewards = [0.1] * len(confidence)  # 0.1 * n / n is not 0.1
    advantages = one(
        rewards, confidence, estimator=estimator, weight=weight, shift=shift, center=center, std_norm=std_norm
    )
    assert advantages.tolist() == [0.0] * len(rewards)


@settings(deadline=None)
@given(groups, weights)
def test_best_worst_and_bound(group: tuple[list[float], list[float]], weight: str) -> None:
    rewards, confidence = group
    advantages = one(rewards, confidence, weight=weight)
    assert advantages[rewards.index(max(rewards))] >= 0
    assert advantages[rewards.index(min(rewards))] <= 0
    assert advantages.abs().max() <= 2 * (max(rewards) - min(rewards)) + 1e-12


@settings(deadline=None)
@given(groups, weights, st.integers(1, 16).map(lambda n: n / 8))
def test_monotone_in_the_own_reward(group: tuple[list[float], list[float]], weight: str, rise: float) -> None:
    rewards, confidence = group
    raised = [rewards[0] + rise, *rewards[1:]]
    before, after = one(rewards, confidence, weight=weight), one(raised, confidence, weight=weight)
    assert after[0] >= before[0] - 1e-12


@settings(deadline=None)
@given(groups, st.sampled_from(["own", "rank", "agree"]))
def test_high_temperature_is_rloo(group: tuple[list[float], list[float]], weight: str) -> None:
    rewards, confidence = group
    rloo = one(rewards, confidence, estimator="rloo")
    torch.testing.assert_close(one(rewards, confidence, weight=weight, tau=1e9), rloo, rtol=0, atol=1e-7)
    assert_close(one(rewards, confidence, weight="uniform"), rloo)


@settings(deadline=None)
@given(groups, st.sampled_from(["rank", "agree", "uniform"]))
def test_antisymmetric_weights_sum_to_zero(group: tuple[list[float], list[float]], weight: str) -> None:
    assert one(*group, weight=weight).sum().abs() < 1e-10


@settings(deadline=None)
@given(groups)
def test_rank_and_agree_add_up_to_twice_uniform(group: tuple[list[float], list[float]]) -> None:
    assert_close(one(*group, weight="rank") + one(*group, weight="agree"), 2 * one(*group, weight="uniform"))


@settings(deadline=None)
@given(groups, st.sampled_from([0.5, 1.0, 2.0]))
def test_own_sums_to_the_tanh_identity(group: tuple[list[float], list[float]], tau: float) -> None:
    rewards, confidence = group
    size = len(rewards)
    expected = sum(
        math.tanh((confidence[i] - confidence[j]) / (2 * tau)) * (rewards[i] - rewards[j])
        for i in range(size)
        for j in range(size)
    ) / (size - 1)
    assert float(one(rewards, confidence, weight="own", tau=tau).sum()) == pytest.approx(expected, abs=1e-10)


@settings(deadline=None)
@given(groups, st.sampled_from([0.5, 1.0, 2.0]))
def test_rank_is_the_gradient_of_the_pairwise_logistic_loss(group: tuple[list[float], list[float]], tau: float) -> None:
    rewards_G = torch.tensor(group[0], dtype=torch.float64)
    confidence_G = torch.tensor(group[1], dtype=torch.float64, requires_grad=True)
    gaps_GG = rewards_G[:, None] - rewards_G[None, :]
    margins_GG = gaps_GG.sign() * (confidence_G[:, None] - confidence_G[None, :]) / tau
    loss = (gaps_GG.abs() * torch.nn.functional.softplus(-margins_GG)).triu(diagonal=1).sum()
    (slope_G,) = torch.autograd.grad(loss, confidence_G)
    assert_close(one(*group, weight="rank", tau=tau), -2 * tau / (len(rewards_G) - 1) * slope_G)


def test_order_is_not_preserved() -> None:
    """A documented consequence of ``own``: nobody should rely on the opposite."""
    advantages = one([1.0, 0.9, 0.0], [-6.0, 6.0, 0.0], weight="own")
    assert advantages[0] < advantages[1]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(2, 5), st.sampled_from(["lambda", "rloo", "grpo", "dr_grpo"]), weights)
def test_a_batch_equals_its_groups(num_groups: int, size: int, estimator: str, weight: str) -> None:
    generator = torch.Generator().manual_seed(num_groups * 10 + size)
    rewards_BG, confidence_BG = torch.randn(2, num_groups, size, dtype=torch.float64, generator=generator)
    config = AdvantageConfig(estimator=estimator, weight=weight, center=True, shift=0.1, std_norm=True)
    together = estimate_advantages(rewards_BG, confidence_BG, config)
    for row in range(num_groups):
        alone = estimate_advantages(rewards_BG[row : row + 1], confidence_BG[row : row + 1], config)
        assert_close(together[row], alone[0])


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("shape", [(3, 1), (1, 1), (0, 4), (2, 0)])
def test_groups_of_one_and_none(shape: tuple[int, int], estimator: str) -> None:
    zeros = torch.zeros(shape, dtype=torch.float64)
    assert torch.equal(estimate_advantages(zeros + 1, zeros, AdvantageConfig(estimator=estimator, shift=1.0)), zeros)


def test_the_shift_spares_a_group_of_equals_beside_others() -> None:
    rewards_BG = torch.tensor([[1.0, 1.0], [2.0, 0.0]], dtype=torch.float64)
    advantages_BG = estimate_advantages(rewards_BG, torch.zeros_like(rewards_BG), AdvantageConfig(shift=0.5))
    assert_close(advantages_BG, torch.tensor([[0.0, 0.0], [2.5, -1.5]]).double())


@pytest.mark.parametrize("estimator", ["grpo", "reinforce_pp"])
def test_rewards_that_differ_by_rounding_are_not_blown_up(estimator: str) -> None:
    assert one([0.1 + 0.2, 0.3], [0.0, 0.0], estimator=estimator).abs().max() < 1e-9


def test_the_other_estimators() -> None:
    rewards, confidence = [1.0, 0.0, 0.0, 1.0, 1.0], [0.0] * 5
    std = reference.standard_deviation(rewards)
    centred = [reward - 0.6 for reward in rewards]
    assert_close(one(rewards, confidence, estimator="dr_grpo"), centred)
    assert_close(one(rewards, confidence, estimator="grpo"), [value / std for value in centred])
    assert_close(one(rewards, confidence, estimator="rloo"), [value * 5 / 4 for value in centred])


def test_reinforce_pp_divides_by_the_batch() -> None:
    rewards = [[1.0, 0.0], [4.0, 0.0]]
    config = AdvantageConfig(estimator="reinforce_pp")
    actual = estimate_advantages(torch.tensor(rewards, dtype=torch.float64), torch.zeros(2, 2), config)
    centred = [0.5, -0.5, 2.0, -2.0]
    assert_close(actual.flatten(), [value / reference.standard_deviation(centred) for value in centred])


def test_controls_come_in_order() -> None:
    rewards, confidence = [1.0, 0.0, 0.0], [1.0, -1.0, 0.5]
    plain = one(rewards, confidence)
    assert plain.sum().abs() > 0.1
    assert_close(one(rewards, confidence, center=True), plain - plain.mean())
    assert_close(one(rewards, confidence, shift=0.3), plain + 0.3)
    assert_close(one(rewards, confidence, center=True, shift=0.3), plain - plain.mean() + 0.3)
    std = reference.standard_deviation(rewards)
    assert_close(one(rewards, confidence, std_norm=True, shift=0.3), plain / std + 0.3)
    assert_close(one(rewards, confidence, estimator="grpo", std_norm=True), one(rewards, confidence, estimator="grpo"))


@pytest.mark.parametrize("shape", [(2, 3), (6,)])
def test_shapes_must_agree(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"rewards {re.escape(str(shape))} and confidence .* must share one shape"):
        estimate_advantages(torch.zeros(shape), torch.zeros(shape if shape == (6,) else (3, 2)), AdvantageConfig())


def columns(*rows: list[float]) -> list[np.ndarray]:
    return [np.array(row, np.float32) for row in rows]


def test_confidence_is_summed_in_float64() -> None:
    (row,) = columns([-0.1, -0.2, -0.7])
    assert group_confidence([row], kind="sum")[0].tolist() == [math.fsum(row.tolist())]


def test_confidence_kinds() -> None:
    logprobs = columns([-1.0, -3.0], [-4.0], [-6.0, -6.0, -6.0])
    assert group_confidence(logprobs, kind="sum")[0].tolist() == [-4.0, -4.0, -18.0]
    assert group_confidence(logprobs, kind="mean")[0].tolist() == [-2.0, -4.0, -6.0]
    z, num_missing = group_confidence(logprobs, kind="z")
    assert z == pytest.approx([math.sqrt(1.5), 0.0, -math.sqrt(1.5)])
    assert (z.dtype, num_missing) == (np.float64, 0)


@pytest.mark.parametrize("kind", ["z", "mean", "sum"])
def test_missing_confidence_is_the_mean_of_the_others(kind: str) -> None:
    logprobs = columns([-1.0], [], [-2.0, -math.inf], [-4.0], [math.nan])
    confidence, num_missing = group_confidence(logprobs, kind=kind)  # type: ignore[arg-type]
    assert num_missing == 3
    others = (confidence[0] + confidence[3]) / 2
    assert confidence[[1, 2, 4]] == pytest.approx([others] * 3)
    present, _ = group_confidence([logprobs[0], logprobs[3]], kind=kind)  # type: ignore[arg-type]
    assert confidence[[0, 3]] == pytest.approx(present)


def test_no_confidence_at_all_is_zero() -> None:
    confidence, num_missing = group_confidence(columns([], [math.nan]), kind="z")
    assert (confidence.tolist(), num_missing) == ([0.0, 0.0], 2)


def test_almost_equal_confidence_is_not_blown_up() -> None:
    confidence, _ = group_confidence(columns([-1.0], [-1.00001]), kind="z")
    assert np.abs(confidence).max() < 0.01
