"""Diagnostics against direct formulas, split in any way."""

import math
import statistics

import pytest
import torch
from torch import Tensor

from lambdapo_async.objective.diagnostics import (
    TokenDiagnostics,
    density_diagnostics,
    group_diagnostics,
    k3_divergence,
    token_metrics,
)

Columns = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def columns(seed: int = 0) -> Columns:
    generator = torch.Generator().manual_seed(seed)
    segments_T = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3])
    behavior_T = -1.0 - torch.rand(11, generator=generator)
    logprobs_T = behavior_T + 0.3 * torch.randn(11, generator=generator)
    mask_T = torch.tensor([False, True, True, False, True, True, True, False, False, False, True])
    ages_T = torch.tensor([99, 1, 9, 0, 5, 0, 0, 0, 0, 0, 2])
    return logprobs_T, behavior_T, mask_T, segments_T, ages_T


def measured(*batches: Columns) -> dict[str, float]:
    diagnostics = TokenDiagnostics()
    for batch in batches:
        diagnostics.add(*batch)
    return token_metrics(diagnostics.sums(), diagnostics.abs_log_max())


def test_equals_the_formulas() -> None:
    logprobs_T, behavior_T, mask_T, segments_T, _ = columns()
    gaps = (logprobs_T - behavior_T).double()
    ratios = [math.exp(gap) for gap, keep in zip(gaps.tolist(), mask_T.tolist(), strict=True) if keep]
    sequence_ratios = [math.exp(float(gaps[mask_T & (segments_T == segment)].sum())) for segment in (0, 1, 3)]
    expected = {
        "ratio/ess_token": sum(ratios) ** 2 / sum(r * r for r in ratios) / 6,
        "ratio/ess_sequence": sum(sequence_ratios) ** 2 / sum(r * r for r in sequence_ratios) / 3,
        "mismatch_kl": sum(r - 1 - math.log(r) for r in ratios) / 6,
        "ratio/log_mean": float(gaps[mask_T].mean()),
        "ratio/abs_log_mean": float(gaps[mask_T].abs().mean()),
        "ratio/abs_log_max": float(gaps[mask_T].abs().max()),
        "staleness/share_0": 2 / 6,
        "staleness/share_1": 1 / 6,
        "staleness/share_2": 1 / 6,
        "staleness/share_3": 0.0,
        "staleness/share_4_7": 1 / 6,
        "staleness/share_8_up": 1 / 6,
    }
    assert measured(columns()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("age", "bucket"),
    [(0, "0"), (1, "1"), (2, "2"), (3, "3"), (4, "4_7"), (7, "4_7"), (8, "8_up"), (100, "8_up")],
)
def test_every_age_is_in_one_bucket(age: int, bucket: str) -> None:
    logprobs_T, behavior_T, mask_T, segments_T, ages_T = columns()
    metrics = measured((logprobs_T, behavior_T, mask_T, segments_T, torch.full_like(ages_T, age)))
    shares = {name.removeprefix("staleness/share_"): share for name, share in metrics.items() if "share_" in name}
    assert {name: share for name, share in shares.items() if share} == {bucket: 1.0}


def test_micro_batches_add_up() -> None:
    whole = columns()
    cut = int((whole[3] == 0).sum())
    parts = [tuple(column[:cut] for column in whole), tuple(column[cut:] for column in whole)]
    for order in (parts, parts[::-1]):
        assert measured(*order) == pytest.approx(measured(whole))  # type: ignore[arg-type]


def test_a_difference_of_kernels_is_not_lost_to_rounding() -> None:
    """Log-ratios of 1/1024: k3 is x^2 / 2 - x^3 / 6 + ..., of which float32 would keep one digit."""
    logprobs_T, ones_T = torch.full((64,), -1.0 - 2**-10), torch.ones(64, dtype=torch.int64)
    metrics = measured((logprobs_T, torch.full((64,), -1.0), ones_T > 0, ones_T.cumsum(0) - 1, ones_T))
    x = -(2**-10)
    assert metrics["mismatch_kl"] == pytest.approx(x**2 / 2 + x**3 / 6 + x**4 / 24, rel=1e-7)
    assert k3_divergence(logprobs_T, torch.full((64,), -1.0)).tolist() == pytest.approx(
        [metrics["mismatch_kl"]] * 64, rel=1e-9
    )


def test_masked_positions_never_leak() -> None:
    logprobs_T, behavior_T, mask_T, segments_T, ages_T = columns()
    logprobs_T[~mask_T], behavior_T[~mask_T] = math.nan, -math.inf
    assert measured((logprobs_T, behavior_T, mask_T, segments_T, ages_T)) == measured(columns())


def test_on_policy_is_clean() -> None:
    logprobs_T, _, mask_T, segments_T, ages_T = columns()
    metrics = measured((logprobs_T, logprobs_T, mask_T, segments_T, ages_T))
    assert (metrics["ratio/ess_token"], metrics["ratio/ess_sequence"]) == (1.0, 1.0)
    assert metrics["mismatch_kl"] == metrics["ratio/abs_log_max"] == 0.0


def test_without_any_tokens() -> None:
    logprobs_T, behavior_T, mask_T, segments_T, ages_T = columns()
    assert measured((logprobs_T, behavior_T, torch.zeros_like(mask_T), segments_T, ages_T)) == {}
    assert measured() == {}
    assert TokenDiagnostics().abs_log_max() == 0.0


def test_extreme_ratios_stay_finite() -> None:
    logprobs_T, behavior_T, mask_T, segments_T, ages_T = columns()
    metrics = measured((logprobs_T, behavior_T * 1000, mask_T, segments_T, ages_T))
    assert all(math.isfinite(value) for value in metrics.values())


def test_group_diagnostics() -> None:
    rewards_BG = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 2.0, 2.0], [1.0, 0.0, 1.0]])
    confidence_BG = torch.tensor([[2.0, 1.0, 1.0], [3.0, 1.0, 2.0], [2.0, 1.0, 3.0], [1.5, 1.5, 1.5]])
    advantages_BG = torch.tensor([[1.0, -0.5, -0.5], [0.0, 0.0, 0.0], [-1.0, 0.2, 0.2], [0.5, -1.0, 0.5]])
    metrics = group_diagnostics(rewards_BG.double(), confidence_BG.double(), advantages_BG.double())
    assert metrics == pytest.approx(
        {
            "advantage/shift": -0.6 / 12,
            "advantage/abs_mean": 5.4 / 12,
            "frac_reward_zero_std": 0.25,
            "confidence/reward_corr": 0.5,  # 1 and 0; the other two groups have none
        },
        abs=1e-6,
    )


def test_group_diagnostics_without_variance() -> None:
    zeros_BG = torch.zeros(2, 3, dtype=torch.float64)
    assert group_diagnostics(zeros_BG, zeros_BG, zeros_BG) == {
        "advantage/shift": 0.0,
        "advantage/abs_mean": 0.0,
        "frac_reward_zero_std": 1.0,
    }
    assert group_diagnostics(zeros_BG[:0], zeros_BG[:0], zeros_BG[:0]) == {}


def test_density_diagnostics() -> None:
    verifiable, density = [1.0, 0.0, 1.0, 0.0], [0.9, 0.3, 0.5, 0.4]
    expected = statistics.correlation(verifiable, density)
    assert density_diagnostics(verifiable, density) == pytest.approx({"density/value_corr": expected})
    assert density_diagnostics([1.0, 0.0], [0.1, 0.9]) == pytest.approx({"density/value_corr": -1.0})
    assert density_diagnostics([1.0, 1.0], [0.1, 0.2]) == {}
    assert density_diagnostics([1.0, 0.0], [0.1, 0.1]) == {}
    assert density_diagnostics([1.0], [0.1]) == density_diagnostics([], []) == {}
