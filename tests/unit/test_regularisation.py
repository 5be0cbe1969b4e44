"""KL to the reference and entropy bonus: values, gradients, and what may never change them."""

import math

import pytest
import torch
from torch import Tensor

from lambdapo_async.config.objective import KlConfig, ObjectiveConfig
from lambdapo_async.objective.policy_loss import LossDenominator
from lambdapo_async.objective.regularisation import Regularisation, kl_estimate, regularisation

T = 6
MASK_T = torch.tensor([False, True, True, True, False, True])
SEGMENTS_T = torch.tensor([0, 0, 0, 1, 1, 1])
LOGPROBS_T = torch.tensor([math.nan, -1.0, -0.5, -2.0, -math.inf, -0.1], dtype=torch.float64)
REFERENCE_T = torch.tensor([-math.inf, -1.5, -0.5, -0.2, math.nan, -3.0], dtype=torch.float64)
ENTROPY_T = torch.tensor([math.nan, 0.3, 0.9, 1.1, math.inf, 0.2], dtype=torch.float64)
DENOMINATOR = LossDenominator(num_loss_tokens=10, num_sequences=4, max_tokens=5)
BOTH = ObjectiveConfig(kl=KlConfig(coefficient=0.3), entropy_coefficient=0.01)


def gradients(
    config: ObjectiveConfig, rows: Tensor, *, reduce: str = "token", reference: Tensor | None = REFERENCE_T
) -> tuple[Regularisation, list[Tensor]]:
    leaves = [LOGPROBS_T.clone().requires_grad_(), ENTROPY_T.clone().requires_grad_()]
    _, segments = torch.unique(SEGMENTS_T[rows], return_inverse=True)
    result = regularisation(
        leaves[0][rows],
        leaves[1][rows],
        None if reference is None else reference[rows],
        MASK_T[rows],
        segments,
        config=config,
        reduce=reduce,  # type: ignore[arg-type]
        denominator=DENOMINATOR,
    )
    found = torch.autograd.grad(result.loss, leaves, allow_unused=True)
    return result, [torch.zeros(T, dtype=torch.float64) if each is None else each for each in found]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_estimators_by_their_formulas(estimator: str) -> None:
    leaf_T = LOGPROBS_T.clone().requires_grad_()
    kl_T = kl_estimate(leaf_T, REFERENCE_T, MASK_T, estimator=estimator)  # type: ignore[arg-type]
    (gradient_T,) = torch.autograd.grad(kl_T.sum(), leaf_T)
    for t in range(T):
        d = float(LOGPROBS_T[t] - REFERENCE_T[t]) if MASK_T[t] else 0.0
        value, slope = {"k1": (d, d), "k2": (d * d / 2, d), "k3": (math.exp(-d) - 1 + d, 1 - math.exp(-d))}[estimator]
        assert float(kl_T[t].detach()) == pytest.approx(value, abs=1e-12)
        assert float(gradient_T[t]) == pytest.approx(slope, abs=1e-12)


def test_their_expected_gradient_is_the_gradient_of_the_kl() -> None:
    """Over all tokens of a small vocabulary, weighted by pi: k1 (as REINFORCE has it) and k2 are exact."""
    logits_V = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    reference_V = torch.log_softmax(torch.tensor([0.0, 0.5, -0.5], dtype=torch.float64), 0)
    logprobs_V = torch.log_softmax(logits_V, 0)
    (exact,) = torch.autograd.grad((logprobs_V.exp() * (logprobs_V - reference_V)).sum(), logits_V, retain_graph=True)
    for estimator in ("k1", "k2"):
        kl_V = kl_estimate(logprobs_V, reference_V, torch.ones(3, dtype=torch.bool), estimator=estimator)  # type: ignore[arg-type]
        (found,) = torch.autograd.grad((logprobs_V.detach().exp() * kl_V).sum(), logits_V, retain_graph=True)
        torch.testing.assert_close(found, exact)


def test_no_coefficient_no_term() -> None:
    columns = (LOGPROBS_T, ENTROPY_T.clone().requires_grad_(), None, MASK_T, SEGMENTS_T)
    result = regularisation(*columns, config=ObjectiveConfig(), reduce="token", denominator=DENOMINATOR)
    assert float(result.loss) == 0.0
    assert result.kl is None
    assert not result.loss.requires_grad, "no backward pass computes what is multiplied by 0"


def test_entropy_is_a_bonus() -> None:
    result, (logprobs, entropy) = gradients(ObjectiveConfig(entropy_coefficient=0.5), torch.arange(T), reference=None)
    assert float(result.loss.detach()) == pytest.approx(-0.5 * (0.3 + 0.9 + 1.1 + 0.2) / 10)
    assert entropy.tolist() == pytest.approx([-0.05 * float(keep) for keep in MASK_T])
    assert (logprobs == 0).all()


def test_kl_is_a_penalty_and_reported_unweighted() -> None:
    result, (_, entropy) = gradients(ObjectiveConfig(kl=KlConfig(coefficient=0.5)), torch.arange(T))
    assert result.kl is not None
    assert float(result.loss.detach()) == pytest.approx(0.5 * float(result.kl) / 10)
    assert float(result.kl) > 0
    assert (entropy == 0).all()


@pytest.mark.parametrize("reduce", ["token", "sequence", "constant"])
def test_micro_batches_add_up_and_masked_positions_never_leak(reduce: str) -> None:
    whole, gradient = gradients(BOTH, torch.arange(T), reduce=reduce)
    parts = [gradients(BOTH, torch.nonzero(segment == SEGMENTS_T)[:, 0], reduce=reduce) for segment in (0, 1)]
    torch.testing.assert_close(parts[0][0].loss + parts[1][0].loss, whole.loss)
    for column in range(2):
        torch.testing.assert_close(parts[0][1][column] + parts[1][1][column], gradient[column])
        assert (gradient[column][~MASK_T] == 0).all()
        assert torch.isfinite(gradient[column]).all()
        assert (gradient[column][MASK_T] != 0).sum() >= 3


def test_a_distant_reference_stays_finite() -> None:
    leaf_T = torch.tensor([-500.0, -0.1], requires_grad=True)
    kl_T = kl_estimate(leaf_T, torch.tensor([-0.1, -500.0]), torch.tensor([True, True]), estimator="k3")
    kl_T.sum().backward()
    assert torch.isfinite(kl_T).all()
    assert leaf_T.grad is not None
    assert torch.isfinite(leaf_T.grad).all()


def test_a_penalty_needs_a_reference() -> None:
    with pytest.raises(ValueError, match="needs the reference's log-probabilities"):
        gradients(BOTH, torch.arange(T), reference=None)
