import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from lambdapo_async.packing import MicroBatch, TrainingSequence, pack
from learner.attention import select_attention
from learner.logprobs import LogprobModel, logit_scale, packed_logprobs, soft_cap
from learner.parallel import Ranks
from learner.projection import CHUNK_LOGITS
from learner.sharding import full_tensors, shard
from tests.ranks import run_ranks
from tests.tiny_models import SIZES, VOCAB, Architecture, layout_of, micro_batch, tiny_model

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


@pytest.fixture
def few_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few that every projection is cut."""
    monkeypatch.setitem(CHUNK_LOGITS, "cpu", 5 * VOCAB)


def assert_equal_with_gradient(model: PreTrainedModel, temperature: float) -> None:
    batch = micro_batch(LENGTHS)
    weights = torch.randn(2, sum(LENGTHS))

    def gradients(outputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        model.zero_grad()
        (weights * torch.stack(outputs)).sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    found = packed_logprobs(model, batch, temperature=temperature)
    expected = reference(model, batch, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found_gradients, expected_gradients = gradients(found), gradients(expected)
    for name, gradient in found_gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equal_to_the_naive_form_with_gradient(architecture: Architecture, temperature: float) -> None:
    assert_equal_with_gradient(tiny_model(architecture), temperature)


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
@pytest.mark.usefixtures("few_logits")
def test_a_cut_projection_is_equal_to_the_naive_form(architecture: Architecture) -> None:
    assert_equal_with_gradient(tiny_model(architecture), 0.7)


@pytest.mark.parametrize(
    ("config", "scale", "cap"),
    [
        (GraniteConfig(**SIZES, logits_scaling=8.0), 1 / 8, None),
        (CohereConfig(**SIZES, logit_scale=0.25, bos_token_id=1, eos_token_id=2), 0.25, None),
        (Gemma2Config(**SIZES, final_logit_softcapping=3.0, attn_logit_softcapping=None), 1.0, 3.0),
    ],
    ids=["granite", "cohere", "gemma2"],
)
def test_models_that_shape_their_logits(config: PreTrainedConfig, scale: float, cap: float | None) -> None:
    model = AutoModelForCausalLM.from_config(config, attn_implementation=select_attention(torch.device("cpu")))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    assert (logit_scale(model), soft_cap(model)) == (scale, cap)
    assert_equal_with_gradient(model.eval(), 0.7)


def test_most_models_leave_their_logits_alone() -> None:
    assert (logit_scale(tiny_model()), soft_cap(tiny_model())) == (1.0, None)


def test_zero_where_there_is_no_loss() -> None:
    batch = micro_batch(LENGTHS, prompt=3)
    logprobs_T, entropy_T = packed_logprobs(tiny_model(), batch, temperature=1.0)
    for values_T in (logprobs_T, entropy_T):
        assert values_T.dtype == torch.float32
        assert values_T.requires_grad
        assert (values_T[~batch.loss_mask_T] == 0).all()
    assert (logprobs_T[batch.loss_mask_T] < 0).all()
    assert (entropy_T[batch.loss_mask_T] > 0).all()
    assert (entropy_T <= math.log(VOCAB)).all()


def test_a_micro_batch_without_loss_gives_zeros_and_no_gradient() -> None:
    model = tiny_model()
    logprobs_T, entropy_T = packed_logprobs(model, micro_batch((4, 3), prompt=9), temperature=1.0)
    (logprobs_T + entropy_T).sum().backward()
    assert (logprobs_T == 0).all()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def group(prompt: int, completions: Sequence[int], *, key: str) -> list[TrainingSequence]:
    rng = np.random.default_rng(prompt)
    prompt_ids = rng.integers(VOCAB, size=prompt)
    return [
        TrainingSequence(
            token_ids=np.concatenate([prompt_ids, rng.integers(VOCAB, size=own)]).astype(np.int32),
            loss_mask=np.arange(prompt + own) >= prompt,
            behavior_logprobs=np.zeros(prompt + own, np.float32),
            advantage=float(number),
            token_versions=np.zeros(prompt + own, np.int64),
            group_key=key,
        )
        for number, own in enumerate(completions)
    ]


def weighted(model: PreTrainedModel, batches: list[MicroBatch]) -> tuple[dict[tuple[float, int], Tensor], Tensor]:
    """(advantage, length) of each rollout -> its logprobs and entropies, and a sum of all that knows their order."""
    found, total = {}, torch.zeros(())
    for batch in batches:
        logprobs_T, entropy_T = packed_logprobs(model, batch, temperature=0.7)
        for segment in batch.segment_ids_T[batch.loss_mask_T].unique():
            own_T = batch.loss_mask_T & (batch.segment_ids_T == segment)
            values = torch.stack([logprobs_T[own_T], entropy_T[own_T]])
            total = total + (values * torch.linspace(-1, 1, values.numel()).view_as(values)).sum()
            found[float(batch.advantages_T[own_T][0]), values.shape[1]] = values
    return found, total


@pytest.mark.parametrize("token_budget", [400, 70])
@pytest.mark.parametrize("kind", [Qwen3Config, MistralConfig, Gemma3TextConfig], ids=lambda kind: kind.model_type)
def test_a_shared_prompt_changes_neither_values_nor_gradients(kind: type[PreTrainedConfig], token_budget: int) -> None:
    """Ragged groups, one of a single rollout, with a window shorter than the prompt; at 70 tokens groups are cut."""
    config = kind(**SIZES, **({} if kind is Qwen3Config else {"sliding_window": 6}))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=select_attention(torch.device("cpu")))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.eval().parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    sequences = [*group(11, (7, 20, 1, 9), key="a"), *group(6, (12,), key="b"), *group(19, (23, 24, 25, 26), key="c")]
    shared = pack(sequences, token_budget=token_budget)
    alone = [batch for each in sequences for batch in pack([each], token_budget=token_budget)]
    assert sum(len(each.input_ids_T) for each in shared) < sum(len(each.input_ids_T) for each in alone)
    assert (len(shared) > 2) == (token_budget == 70)
    results = []
    for batches in (shared, alone):
        found, total = weighted(model, batches)
        gradients = torch.autograd.grad(total, [*model.parameters()])
        results.append((found, gradients))
    assert len(results[0][0]) == len(sequences)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_prompts_are_never_projected() -> None:
    model, batch = tiny_model("llama"), micro_batch((20, 30), prompt=15)
    projected: list[int] = []
    model.lm_head.register_forward_hook(lambda layer, inputs, output: projected.append(len(inputs[0])))
    packed_logprobs(model, batch, temperature=1.0)
    assert projected == [20]


def train_sharded(ranks: Ranks, architecture: Architecture) -> dict[str, Tensor]:
    """On one rank, in its own process: the gradient of two passes over the rank's own micro-batch."""
    CHUNK_LOGITS["cpu"] = 5 * VOCAB
    model = tiny_model(architecture)
    scorer = LogprobModel(model, temperature=0.7)
    shard(scorer, model, ranks)
    batch = micro_batch(LENGTHS, seed=ranks.rank)
    for _ in range(2):
        scored_loss(scorer, batch).backward()
    named = [(name, parameter.grad) for name, parameter in model.named_parameters()]
    return {name: gradient.clone() for name, gradient in full_tensors(named, ranks)}


def scored_loss(scorer: nn.Module, batch: MicroBatch) -> Tensor:
    logprobs_T, entropy_T = scorer(batch)
    return logprobs_T.sum() + 0.1 * entropy_T.sum()


@pytest.mark.system
@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_a_sharded_output_layer_gets_the_gradient_of_a_whole_one(architecture: Architecture, tmp_path: Path) -> None:
    found, _ = run_ranks(tmp_path, 2, train_sharded, architecture)
    model = tiny_model(architecture)
    for seed in (0, 1):
        (2 * scored_loss(LogprobModel(model, temperature=0.7), micro_batch(LENGTHS, seed=seed))).backward()
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-4, msg=name)
