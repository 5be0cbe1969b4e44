"""Every preset against a token-by-token oracle, in value and gradient; then what may never change a gradient."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from lambdapo_async.config.objective import RatioWeight, Rejection, Surrogate
from lambdapo_async.objective.anchor import anchor_of
from lambdapo_async.objective.policy_loss import LossDenominator, PolicyLoss, policy_loss
from lambdapo_async.objective.presets import PRESETS, PolicyLossSpec
from lambdapo_async.objective.second_moment import solve_trust_region
from lambdapo_async.packing import TrainingSequence, pack
from tests.reference import policy_loss as reference
from tests.reference.published import GRADIENTS, Rollouts

REDUCTIONS = ("token", "sequence", "constant")
LENGTHS = (4, 1, 6, 3, 4)
T = sum(LENGTHS)

# Ratios far below, at and far above every bound of the presets; the last two lie outside the clamp of +-20 nats.
LOG_RATIOS = [0.0, 0.1, -0.1, 0.3, -0.4, 1.0, -1.5, 2.5, -4.0, 25.0, -30.0]

EXTRA_SPECS = {
    "token_ratio": replace(PRESETS["cispo"], reject=(Rejection(statistic="token_ratio", lo=0.7, hi=1.5),)),
    "seq_ratio": replace(PRESETS["ppo"], reject=(Rejection(statistic="seq_ratio", hi=2.0, sign="advantage"),)),
    "seq_k3": replace(PRESETS["cispo"], reject=(Rejection(statistic="seq_k3", hi=0.5),)),
    "two_rejections": replace(
        PRESETS["ppo"],
        reject=(Rejection(statistic="token_ratio", hi=1.5), Rejection(statistic="seq_geo", lo=0.5, sign="negative")),
    ),
    "geo_weight": replace(PRESETS["cispo"], weight=RatioWeight(level="geo", op="truncate", lo=0.8, hi=1.2)),
    "clipped_score": replace(
        PRESETS["cispo"], anchor="behavior", weight=RatioWeight(), surrogate=Surrogate(kind="score", eps_hi=0.5)
    ),
    "asymmetric": replace(PRESETS["ppo"], surrogate=Surrogate(eps_lo=0.1, eps_hi=0.6)),
    "negative_only": replace(PRESETS["cispo"], weight=RatioWeight(op="mask", lo=0.8, hi=1.2, sign="negative")),
    "geo_score": replace(PRESETS["cispo"], anchor="behavior", surrogate=Surrogate(kind="score", level="geo")),
}
SPECS = {**PRESETS, **EXTRA_SPECS}


class Tokens:
    """Columns of T tokens in float64; ``spread`` scales how far pi, the proximal policy and mu are apart."""

    def __init__(self, *, spread: float, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        gaps_T = torch.tensor(LOG_RATIOS, dtype=torch.float64).repeat(T)[torch.randperm(T, generator=generator)]
        noise_T = 0.05 * torch.randn(T, dtype=torch.float64, generator=generator)
        self.behavior_T = -0.5 - torch.rand(T, dtype=torch.float64, generator=generator)
        self.logprobs_T = self.behavior_T + spread * (gaps_T + noise_T)
        self.proximal_T = self.behavior_T + spread * gaps_T.roll(3) / 2
        self.segments_T = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
        advantages_N = torch.tensor([1.5, -0.5, -1.0, 0.0, 0.7], dtype=torch.float64)
        self.advantages_T = advantages_N[self.segments_T]
        self.mask_T = torch.rand(T, generator=generator) > 0.25
        self.mask_T[LENGTHS[0]] = True  # the only token of its sequence
        self.alpha_T = torch.rand(T, dtype=torch.float64, generator=generator)
        self.denominator = LossDenominator(int(self.mask_T.sum()), len(LENGTHS), max_tokens=12)

    def anchor_T(self, spec: PolicyLossSpec) -> Tensor:
        return anchor_of(spec, self.logprobs_T, self.behavior_T, self.proximal_T, self.alpha_T)

    def solved(self, spec: PolicyLossSpec) -> PolicyLossSpec:
        """With a second-moment budget spent on all T tokens; any other spec as it is."""
        log_ratio_T = self.logprobs_T - self.anchor_T(spec)
        surrogate = solve_trust_region(spec.surrogate, log_ratio_T[self.mask_T], self.advantages_T[self.mask_T])
        return replace(spec, surrogate=surrogate)

    def columns(self, spec: PolicyLossSpec) -> reference.Columns:
        return reference.Columns(
            behavior=self.behavior_T.tolist(),
            anchor=self.anchor_T(spec).tolist(),
            advantages=self.advantages_T.tolist(),
            mask=self.mask_T.tolist(),
            segments=self.segments_T.tolist(),
        )

    def loss(self, spec: PolicyLossSpec, rows: Tensor | None = None) -> tuple[PolicyLoss, Tensor]:
        """Loss over ``rows`` (all by default, in any order), and d loss / d log pi of all T tokens."""
        rows = torch.arange(T) if rows is None else rows
        leaf_T = self.logprobs_T.clone().requires_grad_()
        _, segments = torch.unique(self.segments_T[rows], return_inverse=True)
        result = policy_loss(
            leaf_T[rows],
            self.behavior_T[rows],
            self.anchor_T(spec)[rows],
            self.advantages_T[rows],
            self.mask_T[rows],
            segments,
            spec=self.solved(spec),
            denominator=self.denominator,
        )
        (gradient_T,) = torch.autograd.grad(result.loss, leaf_T)
        return result, gradient_T


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("spread", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("name", SPECS)
def test_equals_the_oracle(name: str, reduce: str, spread: float) -> None:
    spec = replace(SPECS[name], reduce=reduce)
    tokens = Tokens(spread=spread)
    result, gradient_T = tokens.loss(spec)
    now, columns, spec = tokens.logprobs_T.tolist(), tokens.columns(spec), tokens.solved(spec)
    expected = reference.loss(now, now, columns, spec, tokens.denominator)
    assert result.loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    # Differences of a loss of size S have an error of about 1e-16 S / step.
    slopes = torch.tensor(reference.gradient(now, columns, spec, tokens.denominator), dtype=torch.float64)
    tolerance = 1e-7 * max(1.0, abs(expected), float(slopes.abs().max()))
    torch.testing.assert_close(gradient_T, slopes, rtol=1e-5, atol=tolerance)


SAMPLES = [(0.001, 0), (0.1, 1), (0.6, 0), (0.6, 2)]


@pytest.mark.parametrize(("spread", "seed"), SAMPLES)
@pytest.mark.parametrize("name", PRESETS)
def test_equals_the_papers_gradient(name: str, spread: float, seed: int) -> None:
    tokens = Tokens(spread=spread, seed=seed)
    _, gradient_T = tokens.loss(PRESETS[name])
    keep = tokens.mask_T.numpy()
    rollouts = Rollouts(
        *(column.numpy()[keep] for column in (tokens.logprobs_T, tokens.behavior_T, tokens.proximal_T)),
        alpha=tokens.alpha_T.numpy()[keep],
        advantage=tokens.advantages_T.numpy()[keep],
        sequence=tokens.segments_T.numpy()[keep],
    )
    expected = np.zeros(T)
    expected[keep] = -GRADIENTS[name](rollouts) / (len(LENGTHS) if name == "gspo" else keep.sum())
    assert_close(gradient_T, torch.tensor(expected))


def test_every_preset_has_a_formula_that_its_samples_reach() -> None:
    """Both sides of the bounds, or the table test would compare REINFORCE with itself, or nothing with nothing."""
    assert GRADIENTS.keys() == PRESETS.keys()
    for name, spec in PRESETS.items():
        losses = [Tokens(spread=spread, seed=seed).loss(spec) for spread, seed in SAMPLES]
        assert sum(int(value) for result, _ in losses for value in result.stats.values()) > 0, name
        assert sum(int((gradient_T != 0).sum()) for _, gradient_T in losses) > 5, name


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("name", SPECS)
def test_on_policy_it_is_reinforce(name: str, reduce: str) -> None:
    tokens = Tokens(spread=0.0)
    _, gradient_T = tokens.loss(replace(SPECS[name], reduce=reduce))
    counts_T = torch.bincount(tokens.segments_T, tokens.mask_T.double())[tokens.segments_T].clamp(min=1)
    divisor_T = {
        "token": torch.full_like(counts_T, tokens.denominator.num_loss_tokens),
        "sequence": counts_T * tokens.denominator.num_sequences,
        "constant": torch.full_like(counts_T, tokens.denominator.num_sequences * tokens.denominator.max_tokens),
    }[reduce]
    assert_close(gradient_T, torch.where(tokens.mask_T, -tokens.advantages_T / divisor_T, 0.0))


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("name", SPECS)
def test_micro_batches_and_order_never_change_the_gradient(name: str, reduce: str) -> None:
    spec = replace(SPECS[name], reduce=reduce)
    tokens = Tokens(spread=0.5)
    whole, gradient_T = tokens.loss(spec)
    in_first = torch.isin(tokens.segments_T, torch.tensor([0, 3]))
    parts = [tokens.loss(spec, torch.nonzero(rows)[:, 0]) for rows in (in_first, ~in_first)]
    assert_close(parts[0][1] + parts[1][1], gradient_T)
    assert_close(parts[0][0].loss + parts[1][0].loss, whole.loss)
    for stat, value in whole.stats.items():
        assert parts[0][0].stats[stat] + parts[1][0].stats[stat] == value
    _, shuffled_T = tokens.loss(spec, torch.randperm(T, generator=torch.Generator().manual_seed(1)))
    assert_close(shuffled_T, gradient_T)


@pytest.mark.parametrize("poison", [math.nan, -math.inf, math.inf])
@pytest.mark.parametrize("name", SPECS)
def test_masked_positions_never_leak(name: str, poison: float) -> None:
    spec, tokens, poisoned = SPECS[name], Tokens(spread=0.5), Tokens(spread=0.5)
    for column in ("logprobs_T", "behavior_T", "proximal_T", "advantages_T"):
        getattr(poisoned, column)[~poisoned.mask_T] = poison
    clean, clean_gradient_T = tokens.loss(spec)
    dirty, gradient_T = poisoned.loss(spec)
    assert torch.equal(dirty.loss, clean.loss)
    assert torch.equal(gradient_T, clean_gradient_T)
    assert (gradient_T[~tokens.mask_T] == 0).all()
    assert dirty.stats == clean.stats


@pytest.mark.parametrize("name", SPECS)
def test_extreme_ratios_stay_finite(name: str) -> None:
    tokens = Tokens(spread=100.0)
    result, gradient_T = tokens.loss(SPECS[name])
    assert torch.isfinite(result.loss)
    assert torch.isfinite(gradient_T).all()


@pytest.mark.parametrize("name", SPECS)
def test_no_gradient_reaches_anchor_behavior_or_advantage(name: str) -> None:
    tokens = Tokens(spread=0.3)
    leaves = [
        column.clone().requires_grad_()
        for column in (tokens.logprobs_T, tokens.behavior_T, tokens.proximal_T, tokens.advantages_T)
    ]
    spec = tokens.solved(SPECS[name])
    result = policy_loss(*leaves, tokens.mask_T, tokens.segments_T, spec=spec, denominator=tokens.denominator)
    gradients = torch.autograd.grad(result.loss, leaves, allow_unused=True)
    assert gradients[0] is not None
    assert gradients[1:] == (None, None, None)


@pytest.mark.parametrize("name", SPECS)
def test_a_version_switch_changes_nothing(name: str) -> None:
    """mu is what was recorded, token by token: a sequence of two versions is one column of log-probabilities."""

    def gradient(versions: list[int]) -> list[float]:
        rollout = TrainingSequence(
            token_ids=np.arange(5, dtype=np.int32),
            loss_mask=np.array([False, True, True, True, True]),
            behavior_logprobs=np.array([0.0, -1.0, -0.5, -2.0, -0.1], np.float32),
            advantage=-1.5,
            token_versions=np.array([-1, *versions]),
            group_key="train:0:0",
        )
        (batch,) = pack([rollout], token_budget=8)
        leaf_T = torch.tensor([math.nan, -1.1, -0.7, -1.8, -0.1], requires_grad=True)
        surrogate = SPECS[name].surrogate.model_copy(update={"second_moment": None})
        policy_loss(
            leaf_T,
            batch.behavior_logprobs_T,
            anchor_of(SPECS[name], leaf_T, batch.behavior_logprobs_T, None, torch.ones(5)),
            batch.advantages_T,
            batch.loss_mask_T,
            batch.segment_ids_T,
            spec=replace(SPECS[name], surrogate=surrogate),
            denominator=LossDenominator(4, 1, 4),
        ).loss.backward()
        assert leaf_T.grad is not None
        return leaf_T.grad.tolist()

    assert gradient([3, 3, 3, 3]) == gradient([3, 3, 4, 5])


def test_a_sequence_without_loss_tokens_adds_nothing() -> None:
    tokens = Tokens(spread=0.3)
    tokens.mask_T[tokens.segments_T == 2] = False
    for spec, reduce in itertools.product(SPECS.values(), REDUCTIONS):
        result, gradient_T = tokens.loss(replace(spec, reduce=reduce))
        assert torch.isfinite(result.loss)
        assert (gradient_T[tokens.segments_T == 2] == 0).all()


def test_an_unsolved_budget_is_refused() -> None:
    tokens = Tokens(spread=0.1)
    columns = (tokens.logprobs_T, tokens.behavior_T, tokens.behavior_T, tokens.advantages_T)
    with pytest.raises(ValueError, match="call solve_trust_region first"):
        policy_loss(*columns, tokens.mask_T, tokens.segments_T, spec=PRESETS["m2po"], denominator=tokens.denominator)


@pytest.mark.parametrize("counts", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_a_denominator_of_zero_is_refused(counts: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="nothing to divide by"):
        LossDenominator(*counts)
