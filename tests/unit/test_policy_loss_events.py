"""Which tokens a policy loss clips, truncates, masks or rejects: few enough to count by hand."""

import math
from dataclasses import replace

import pytest
import torch

from lambdapo_async.config.objective import RatioWeight, Rejection, Surrogate
from lambdapo_async.objective.anchor import anchor_of
from lambdapo_async.objective.policy_loss import LossDenominator, PolicyLoss, policy_loss
from lambdapo_async.objective.presets import PRESETS, PolicyLossSpec


def truncated(**settings: object) -> PolicyLossSpec:
    return replace(PRESETS["cispo"], weight=RatioWeight(op="truncate", **settings))


def rejecting(statistic: str, **settings: object) -> PolicyLossSpec:
    return replace(PRESETS["cispo"], weight=RatioWeight(), reject=(Rejection(statistic=statistic, **settings),))


def five_tokens(spec: PolicyLossSpec) -> PolicyLoss:
    """Positive advantage at ratios 1, 4 and 0.1; negative at 0.1 and 6; a masked token at 100."""
    ratios = torch.tensor([1.0, 4.0, 0.1, 0.1, 6.0, 100.0])
    behavior_T = torch.full((6,), -7.0)
    logprobs_T = behavior_T + ratios.log()
    return policy_loss(
        logprobs_T,
        behavior_T,
        anchor_of(spec, logprobs_T, behavior_T, None, torch.ones(6)),
        torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0]),
        torch.tensor([True] * 5 + [False]),
        torch.arange(6),
        spec=spec,
        denominator=LossDenominator(5, 6, 1),
    )


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (PRESETS["ppo"], {"clipped_pos": 1, "clipped_neg": 1}),
        (replace(PRESETS["ppo"], surrogate=Surrogate(dual=3.0)), {"clipped_pos": 1, "clipped_neg": 2}),
        (replace(PRESETS["ppo"], surrogate=Surrogate(eps_lo=0.95)), {"clipped_pos": 1}),
        (PRESETS["cispo"], {"truncated_pos": 1, "truncated_neg": 1}),
        (PRESETS["topr"], {"truncated_neg": 1}),
        (truncated(lo=1.0, hi=1.0), {"truncated_pos": 2, "truncated_neg": 2}),
        (PRESETS["icepop"], {"masked_pos": 1, "masked_neg": 2}),
        (PRESETS["v32_mask"], {"clipped_pos": 1, "clipped_neg": 1, "rejected_neg": 1}),
        (rejecting("token_ratio", lo=1.0, hi=1.0), {"rejected_pos": 2, "rejected_neg": 2}),
        (rejecting("seq_k3", hi=1.5), {"rejected_pos": 1, "rejected_neg": 1}),  # 0, 1.61, 1.40; 1.40, 3.21
        (rejecting("seq_k3", hi=1.3, sign="advantage"), {"rejected_pos": 1, "rejected_neg": 1}),
    ],
)
def test_stats_count_loss_tokens_by_sign(spec: PolicyLossSpec, expected: dict[str, int]) -> None:
    stats = {name: int(value) for name, value in five_tokens(spec).stats.items()}
    assert {name: value for name, value in stats.items() if value} == expected
    assert len(stats) == 8


def test_a_bound_for_negative_advantages_leaves_the_others_their_weight_of_one() -> None:
    loss = five_tokens(truncated(hi=0.8, sign="negative")).loss
    weighted = [1.0, 1.0, 1.0, -0.1, -0.8]  # w A
    logprobs = [math.log(ratio) - 7 for ratio in (1.0, 4.0, 0.1, 0.1, 6.0)]
    assert float(loss) == pytest.approx(-sum(w * each for w, each in zip(weighted, logprobs, strict=True)) / 5)


def two_sequences(log_ratios: list[float], spec: PolicyLossSpec) -> dict[str, int]:
    """Positive advantage in the first sequence of two loss tokens and a masked one, negative in the second."""
    logprobs_T = torch.tensor(log_ratios) - 7.0
    behavior_T = torch.full_like(logprobs_T, -7.0)
    result = policy_loss(
        logprobs_T,
        behavior_T,
        logprobs_T,
        torch.tensor([0.5] * 3 + [-0.5] * 3),
        torch.tensor([True, True, False] * 2),
        torch.tensor([0] * 3 + [1] * 3),
        spec=spec,
        denominator=LossDenominator(4, 2, 1),
    )
    return {name: int(value) for name, value in result.stats.items() if value}


def test_a_sequence_s_masked_tokens_are_not_counted_with_it() -> None:
    far = [1.0, 1.0, 9.0] * 2
    assert two_sequences(far, PRESETS["topr"]) == {"truncated_neg": 2}
    assert two_sequences(far, PRESETS["seq_mis"]) == {"masked_pos": 2, "masked_neg": 2}
    assert two_sequences(far, rejecting("seq_ratio", hi=5.0)) == {"rejected_pos": 2, "rejected_neg": 2}


def test_a_sequence_that_moved_both_ways_alike_went_nowhere() -> None:
    there_and_back = [2.0, -2.0, 9.0] * 2
    assert two_sequences(there_and_back, rejecting("seq_k3", hi=1.0)) == {"rejected_pos": 2, "rejected_neg": 2}
    assert two_sequences(there_and_back, rejecting("seq_k3", hi=1.0, sign="advantage")) == {}


def test_a_step_back_is_never_too_far() -> None:
    outward_is_up_then_down = rejecting("token_ratio", lo=0.7, hi=1.3, sign="advantage")
    assert two_sequences([0.5, -0.5, 9.0] * 2, outward_is_up_then_down) == {"rejected_pos": 1, "rejected_neg": 1}
