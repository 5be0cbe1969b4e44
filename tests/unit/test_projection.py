from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lambdapo_async.errors import ConfigError
from learner.online_softmax import grad_of_output
from learner.projection import project
from tests.products import Products

S, V, E = 7, 11, 5
ALL = S * V
CHUNKS = [1, S, 4 * S, 10 * S, ALL - 1, ALL]
"""One column at a time, ragged last chunks, all logits but one, and the definition itself."""


def layer(*, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(E, V, bias=bias, dtype=dtype)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden_SE = torch.randn(S, E, generator=generator, dtype=dtype) * 2
    return hidden_SE.requires_grad_(), torch.randint(V, (S,), generator=generator)


def oracle(
    head: nn.Linear, hidden_SE: Tensor, target_S: Tensor, temperature: float, soft_cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """One position at a time, from the definitions of softmax and entropy, in float64."""
    logprobs, entropies = [], []
    for hidden_E, target in zip(hidden_SE.double(), target_S.tolist(), strict=True):
        logits_V = head.weight.double() @ hidden_E
        if head.bias is not None:
            logits_V = logits_V + head.bias.double()
        if soft_cap is not None:
            logits_V = soft_cap * torch.tanh(logits_V / soft_cap)
        p_V = (logits_V / temperature).exp() / (logits_V / temperature).exp().sum()
        logprobs.append(p_V[target].log())
        entropies.append(-sum(p * p.log() for p in p_V))
    return torch.stack(logprobs), torch.stack(entropies)


def upstream() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(S, generator=generator), torch.randn(S, generator=generator)


def gradients(
    outputs: tuple[Tensor, Tensor], wanted: list[Tensor], *, of: tuple[bool, bool] = (True, True)
) -> tuple[Tensor, ...]:
    """Of a loss that weighs every log-probability and every entropy differently."""
    terms = [
        (weight.to(output.dtype) * output).sum()
        for weight, output, counts in zip(upstream(), outputs, of, strict=True)
        if counts
    ]
    return torch.autograd.grad(sum(terms), wanted)


def parameters_and(hidden_SE: Tensor, head: nn.Linear) -> list[Tensor]:
    return [hidden_SE, *head.parameters()]


@pytest.mark.parametrize("chunk_logits", CHUNKS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("temperature", "soft_cap"), [(1.0, None), (0.6, None), (0.6, 1.5)])
def test_equal_to_the_oracle_with_gradients(
    chunk_logits: int, bias: bool, temperature: float, soft_cap: float | None
) -> None:
    head, (hidden_SE, target_S) = layer(bias=bias), inputs()
    wanted = parameters_and(hidden_SE, head)
    found = project(head, hidden_SE, target_S, temperature=temperature, soft_cap=soft_cap, chunk_logits=chunk_logits)
    expected = oracle(head, hidden_SE, target_S, temperature, soft_cap)
    for output, reference in zip(found, expected, strict=True):
        assert output.dtype == torch.float32
        torch.testing.assert_close(output.double(), reference, rtol=1e-6, atol=1e-6)
    for gradient, reference in zip(gradients(found, wanted), gradients(expected, wanted), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("chunk_logits", [3 * S, ALL])
@pytest.mark.parametrize("of", [(True, False), (False, True)])
def test_a_loss_of_one_output_alone(chunk_logits: int, of: tuple[bool, bool]) -> None:
    head, (hidden_SE, target_S) = layer(), inputs()
    wanted = parameters_and(hidden_SE, head)
    found = project(head, hidden_SE, target_S, temperature=0.8, chunk_logits=chunk_logits)
    expected = oracle(head, hidden_SE, target_S, 0.8)
    for gradient, reference in zip(gradients(found, wanted, of=of), gradients(expected, wanted, of=of), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=2e-6)


@settings(max_examples=15, deadline=None)
@given(chunk_logits=st.integers(1, ALL), scale=st.floats(0.01, 100), temperature=st.floats(0.2, 5))
def test_where_it_is_cut_does_not_matter(chunk_logits: int, scale: float, temperature: float) -> None:
    head, (hidden_SE, target_S) = layer(dtype=torch.float64), inputs(torch.float64)
    wanted = parameters_and(hidden_SE, head)

    def run(limit: int) -> tuple[Tensor, ...]:
        outputs = project(head, hidden_SE * scale, target_S, temperature=temperature, chunk_logits=limit)
        return *outputs, *gradients(outputs, wanted)

    torch.testing.assert_close(run(chunk_logits), run(ALL), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("chunk_logits", [1, 4 * S])
def test_gradcheck(chunk_logits: int) -> None:
    hidden_SE, target_S = inputs(torch.float64)

    def outputs(hidden_SE: Tensor, weight_VE: Tensor, bias_V: Tensor) -> tuple[Tensor, Tensor]:
        head = layer(dtype=torch.float64)
        del head.weight, head.bias  # plain tensors instead of parameters, so that gradcheck can move them
        head.weight, head.bias = weight_VE, bias_V
        return project(head, hidden_SE, target_S, temperature=0.7, chunk_logits=chunk_logits)

    free = [parameter.detach().clone().requires_grad_() for parameter in layer(dtype=torch.float64).parameters()]
    assert torch.autograd.gradcheck(outputs, (hidden_SE, *free))


def test_a_certain_token_among_huge_logits() -> None:
    head, (hidden_SE, target_S) = layer(), inputs()
    with torch.no_grad():
        head.bias.copy_(torch.linspace(-1e4, 1e4, V))
    outputs = project(head, hidden_SE, torch.full_like(target_S, V - 1), temperature=1.0, chunk_logits=2 * S)
    for output in outputs:
        torch.testing.assert_close(output, torch.zeros(S))
    for gradient in gradients(outputs, parameters_and(hidden_SE, head)):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("chunk_logits", [3 * S, ALL])
def test_a_frozen_layer_passes_the_gradient_on(chunk_logits: int) -> None:
    head, (hidden_SE, target_S) = layer(), inputs()
    expected = gradients(oracle(head, hidden_SE, target_S, 1.0), [hidden_SE])
    head.requires_grad_(False)
    outputs = project(head, hidden_SE, target_S, temperature=1.0, chunk_logits=chunk_logits)
    torch.testing.assert_close(gradients(outputs, [hidden_SE]), expected, rtol=1e-5, atol=2e-6)


def test_frozen_hidden_states_train_the_layer() -> None:
    head, (hidden_SE, target_S) = layer(), inputs()
    wanted = list(head.parameters())
    expected = gradients(oracle(head, hidden_SE, target_S, 1.0), wanted)
    outputs = project(head, hidden_SE.detach(), target_S, temperature=1.0, chunk_logits=3 * S)
    torch.testing.assert_close(gradients(outputs, wanted), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("chunk_logits", [3 * S, ALL])
def test_without_gradient_nothing_is_recorded(chunk_logits: int) -> None:
    head, (hidden_SE, target_S) = layer(), inputs()
    with torch.no_grad():
        outputs = project(head, hidden_SE, target_S, temperature=1.0, chunk_logits=chunk_logits)
    assert not any(output.requires_grad for output in outputs)
    expected = project(head, hidden_SE, target_S, temperature=1.0, chunk_logits=chunk_logits)
    torch.testing.assert_close(outputs, tuple(output.detach() for output in expected))


def test_gradients_accumulate() -> None:
    head, (hidden_SE, target_S) = layer(), inputs()
    for _ in range(2):
        logprobs_S, _ = project(head, hidden_SE, target_S, temperature=1.0, chunk_logits=3 * S)
        logprobs_S.sum().backward()
    expected = torch.autograd.grad(oracle(head, hidden_SE, target_S, 1.0)[0].sum(), parameters_and(hidden_SE, head))
    for tensor, gradient in zip(parameters_and(hidden_SE, head), expected, strict=True):
        torch.testing.assert_close(tensor.grad, 2 * gradient, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("soft_cap", [None, 1.5])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
@pytest.mark.parametrize(("kept_logits", "num_kept"), [(0, 0), (3 * S - 1, 0), (3 * S, 1), (9 * S, 3), (ALL, 4)])
def test_logits_that_are_kept_are_not_computed_again(
    kept_logits: int, num_kept: int, temperature: float, soft_cap: float | None, autocast: bool
) -> None:
    """Four chunks: of 3, 3, 3 and 2 columns; each takes one product forward and, computed again, three backward."""
    head, (hidden_SE, target_S) = layer(), inputs()

    def run(kept: int) -> tuple[int, int, tuple[Tensor, ...]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Products() as forward:
            outputs = project(
                head,
                hidden_SE,
                target_S,
                temperature=temperature,
                soft_cap=soft_cap,
                chunk_logits=3 * S,
                kept_logits=kept,
            )
        with Products() as backward:
            found = gradients(outputs, parameters_and(hidden_SE, head))
        return forward.count, backward.count, (*outputs, *found)

    num_forward, num_backward, found = run(kept_logits)
    assert (num_forward, num_backward) == (4, 12 - num_kept)
    assert all(map(torch.equal, found, run(0)[2]))


def test_kept_logits_last_for_one_backward_pass() -> None:
    head, (hidden_SE, target_S) = layer(), inputs()
    outputs = project(head, hidden_SE, target_S, temperature=0.8, chunk_logits=3 * S, kept_logits=6 * S)
    with Products() as products:
        found = [torch.autograd.grad(outputs[0].sum(), hidden_SE, retain_graph=True)[0] for _ in range(2)]
    assert products.count == (12 - 2) + 12
    assert torch.equal(*found)


def test_a_backward_pass_that_fails_may_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    head, (hidden_SE, target_S) = layer(), inputs()
    outputs = project(head, hidden_SE, target_S, temperature=0.8, chunk_logits=3 * S, kept_logits=9 * S)
    calls = []

    def fail_at_the_second(*args: object) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return grad_of_output(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("learner.projection.grad_of_output", fail_at_the_second)
    with pytest.raises(torch.OutOfMemoryError):
        torch.autograd.grad(outputs[0].sum(), hidden_SE, retain_graph=True)
    found = torch.autograd.grad(outputs[0].sum(), hidden_SE)
    expected = torch.autograd.grad(oracle(head, hidden_SE, target_S, 0.8)[0].sum(), hidden_SE)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("backward_under_autocast", [True, False])
def test_autocast_keeps_masters_in_float32(backward_under_autocast: bool) -> None:
    head, (hidden_SE, target_S) = layer(), inputs()
    wanted = parameters_and(hidden_SE, head)

    def run(chunk_logits: int) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = project(head, hidden_SE, target_S, temperature=0.8, chunk_logits=chunk_logits)
        with torch.autocast("cpu", torch.bfloat16, enabled=backward_under_autocast):
            return *outputs, *gradients(outputs, wanted)

    cut, whole = run(3 * S), run(ALL)
    assert {tensor.dtype for tensor in cut} == {torch.float32}
    torch.testing.assert_close(cut, whole, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(cut[:2], whole[:2], rtol=1e-6, atol=1e-6)  # the same bfloat16 logits
    exact = oracle(head, hidden_SE, target_S, 0.8)
    assert (cut[0] - exact[0]).abs().max() > 1e-4  # bfloat16 was used


def test_the_backward_pass_computes_in_the_type_of_the_forward_pass() -> None:
    head, (hidden_SE, target_S) = layer(), inputs()
    wanted = parameters_and(hidden_SE, head)
    outputs = project(head, hidden_SE, target_S, temperature=0.8, chunk_logits=3 * S)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(outputs, wanted)
    expected = gradients(oracle(head, hidden_SE, target_S, 0.8), wanted)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


def test_bfloat16_weights_without_autocast() -> None:
    """As FSDP2 gathers them."""
    head, (hidden_SE, target_S) = layer(dtype=torch.bfloat16), inputs(torch.bfloat16)
    wanted = parameters_and(hidden_SE, head)
    outputs = project(head, hidden_SE, target_S, temperature=1.0, chunk_logits=3 * S)
    assert {output.dtype for output in outputs} == {torch.float32}
    expected = gradients(oracle(head, hidden_SE, target_S, 1.0), wanted)
    for gradient, reference in zip(gradients(outputs, wanted), expected, strict=True):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient, reference, rtol=3e-2, atol=3e-2)


def test_the_gradient_of_bfloat16_hidden_states_is_added_up_in_float32() -> None:
    """With equal logits it is 1 - 1024 / 1024; subtracted from 1 one by one, each 1,024th would be rounded away."""
    head, hidden_SE = nn.Linear(1, 1024, bias=False, dtype=torch.bfloat16), torch.ones(1, 1, dtype=torch.bfloat16)
    nn.init.ones_(head.weight)
    outputs = project(head, hidden_SE.requires_grad_(), torch.tensor([0]), temperature=1.0, chunk_logits=1)
    assert abs(float(torch.autograd.grad(outputs[0].sum(), hidden_SE)[0])) < 0.01


def test_hidden_states_may_be_recomputed() -> None:
    head, (hidden_SE, target_S) = layer(), inputs()
    body = nn.Linear(E, E)

    def run(hidden: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        outputs = project(head, hidden(hidden_SE), target_S, temperature=1.0, chunk_logits=3 * S)
        return gradients(outputs, [hidden_SE, *body.parameters(), *head.parameters()])

    torch.testing.assert_close(run(lambda x: checkpoint(body, x, use_reentrant=False)), run(body))


def test_a_layer_that_does_more_is_refused() -> None:
    class Adapted(nn.Linear):
        pass

    hidden_SE, target_S = inputs()
    with pytest.raises(ConfigError, match="the output layer is a Adapted"):
        project(Adapted(E, V), hidden_SE, target_S, temperature=1.0, chunk_logits=ALL)
