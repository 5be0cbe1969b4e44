import math

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lambdapo_async.packing import MicroBatch
from learner.logprobs import packed_logprobs, project
from tests.tiny_models import VOCAB, Architecture, layout_of, micro_batch, tiny_model

LENGTHS = (7, 3, 12, 4)


def reference(model: PreTrainedModel, batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
    """All logits at once, one token at a time."""
    inputs = {"input_ids": batch.input_ids_T[None], "position_ids": batch.position_ids_T[None]}
    logits = model(**inputs, use_cache=False, layout=layout_of(batch)).logits[0] / temperature
    logprobs, entropy = torch.zeros(logits.shape[0]), torch.zeros(logits.shape[0])
    for t in batch.loss_mask_T.nonzero()[:, 0].tolist():
        probabilities = logits[t - 1].exp() / logits[t - 1].exp().sum()
        logprobs[t] = probabilities[batch.input_ids_T[t]].log()
        entropy[t] = -(probabilities * probabilities.log()).sum()
    return logprobs, entropy


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_logits", [2**20, 5 * VOCAB, 1])
def test_equal_to_the_naive_form_with_gradient(
    architecture: Architecture, temperature: float, chunk_logits: int
) -> None:
    model, batch = tiny_model(architecture), micro_batch(LENGTHS)
    upstream = torch.randn(sum(LENGTHS))
    found = packed_logprobs(model, batch, temperature=temperature, chunk_logits=chunk_logits)
    (found[0] * upstream).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    expected = reference(model, batch, temperature)
    (expected[0] * upstream).sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_zero_where_there_is_no_loss_and_entropy_has_no_gradient() -> None:
    batch = micro_batch(LENGTHS, prompt=3)
    logprobs_T, entropy_T = packed_logprobs(tiny_model(), batch, temperature=1.0)
    assert (logprobs_T[~batch.loss_mask_T] == 0).all()
    assert (logprobs_T[batch.loss_mask_T] < 0).all()
    assert (entropy_T[batch.loss_mask_T] > 0).all()
    assert (entropy_T <= math.log(VOCAB)).all()
    assert logprobs_T.requires_grad
    assert not entropy_T.requires_grad


def test_a_micro_batch_without_loss_gives_zeros_and_no_gradient() -> None:
    model = tiny_model()
    logprobs_T, _ = packed_logprobs(model, micro_batch((4, 3), prompt=9), temperature=1.0)
    logprobs_T.sum().backward()
    assert (logprobs_T == 0).all()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


class CountingHead(nn.Linear):
    """Notes how many positions each call projects."""

    def __init__(self) -> None:
        super().__init__(8, VOCAB, bias=False)
        self.projected: list[int] = []

    def forward(self, hidden: Tensor) -> Tensor:
        self.projected.append(hidden.shape[0])
        return super().forward(hidden)


def test_prompts_are_never_projected() -> None:
    model, batch = tiny_model("llama", hidden_size=8), micro_batch((20, 30), prompt=15)
    model.lm_head = CountingHead()
    packed_logprobs(model, batch, temperature=1.0)
    assert model.lm_head.projected == [20]


def test_a_large_projection_is_cut_and_recomputed_and_keeps_no_logits() -> None:
    torch.manual_seed(0)
    head, hidden, target = CountingHead(), torch.randn(10, 8, requires_grad=True), torch.randint(VOCAB, (10,))
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        logprobs, _ = project(head, hidden, target, temperature=1.0, chunk_logits=4 * VOCAB)
    assert head.projected == [4, 4, 2]
    assert max(saved, default=0) < 4 * VOCAB
    logprobs.sum().backward()
    assert len(head.projected) == 6
    assert sorted(head.projected[3:]) == [2, 4, 4]


def test_a_small_projection_is_done_once() -> None:
    head, hidden, target = CountingHead(), torch.randn(10, 8, requires_grad=True), torch.randint(VOCAB, (10,))
    logprobs, _ = project(head, hidden, target, temperature=1.0, chunk_logits=10 * VOCAB)
    logprobs.sum().backward()
    assert head.projected == [10]
