"""Attention over ranks that hold a part of the tokens each, against one process that holds all."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lambdapo_async.config.learner import LearnerConfig
from lambdapo_async.errors import ConfigError
from lambdapo_async.packed_layout import Segment, packed_layout
from lambdapo_async.packing import MicroBatch, TrainingSequence, pack
from lambdapo_async.rank_balance import filler
from learner.attention import register_attention
from learner.attention_kernels import Scores, choose_backend, sdpa_attention
from learner.context_parallel import check_heads, shard_sizes, shard_tokens, sharded_backend, ulysses
from learner.logprobs import packed_logprobs
from learner.memory_plan import plan_memory
from learner.parallel import Ranks
from tests.ranks import run_ranks
from tests.tiny_models import VOCAB, layout_of, micro_batch, tiny_model

LENGTHS = (5, 1, 13, 8)
"""27 tokens: the first rank holds 14, and the third document lies on both."""
LAYOUT = packed_layout([Segment(5), Segment(8), Segment(9, range(5, 13)), Segment(5, range(5, 13))])
"""The same number: the second completion lies on the other rank than its prompt."""
SCORES = Scores(0.3, window=7)


def world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def states(kv_heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(LENGTHS), heads, 6) for heads in (4, kv_heads, kv_heads, 4)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def attend_sharded(_: Ranks, kv_heads: int) -> list[Tensor]:
    *inputs, upstream = (shard_tokens(each, world()) for each in states(kv_heads))
    leaves = [each.clone().requires_grad_() for each in inputs]
    output = ulysses(sdpa_attention, world())(*leaves, LAYOUT, SCORES)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_outputs_and_gradients_equal_one_process(tmp_path: Path, kv_heads: int) -> None:
    *inputs, upstream = states(kv_heads)
    leaves = [each.requires_grad_() for each in inputs]
    output = sdpa_attention(*leaves, LAYOUT, SCORES)
    expected = [output.detach(), *torch.autograd.grad(output, leaves, upstream)]
    shards = run_ranks(tmp_path, 2, attend_sharded, kv_heads)
    for whole, *parts in zip(expected, *shards, strict=True):
        torch.testing.assert_close(torch.cat(parts), whole)


def train_sharded(_: Ranks) -> dict[str, Tensor]:
    """Gradients of an unpatched model's parameters, summed over the group."""
    model = tiny_model("qwen3").double()
    model.set_attn_implementation(register_attention(sharded_backend(choose_backend(None), world())))
    batch, upstream = micro_batch(LENGTHS), torch.linspace(-1, 1, sum(LENGTHS), dtype=torch.float64)
    ids_t, positions_t, upstream_t = (
        shard_tokens(each, world()) for each in (batch.input_ids_T, batch.position_ids_T, upstream)
    )
    logits = model(
        input_ids=ids_t[None], position_ids=positions_t[None], use_cache=False, layout=layout_of(batch)
    ).logits[0]
    (logits.square().sum(1) * upstream_t).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for gradient in gradients.values():
        dist.all_reduce(gradient, group=world())
    return gradients


def test_an_unpatched_model_has_the_gradient_of_one_process(tmp_path: Path) -> None:
    model, batch = tiny_model("qwen3").double(), micro_batch(LENGTHS)
    inputs = {"input_ids": batch.input_ids_T[None], "position_ids": batch.position_ids_T[None]}
    logits = model(**inputs, use_cache=False, layout=layout_of(batch)).logits[0]
    (logits.square().sum(1) * torch.linspace(-1, 1, sum(LENGTHS), dtype=torch.float64)).sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    for found in run_ranks(tmp_path, 2, train_sharded):
        torch.testing.assert_close(found, expected)


def rollout(prompt: list[int], num_tokens: int) -> TrainingSequence:
    ids = np.array([*prompt, *(7 * k % VOCAB for k in range(num_tokens))], np.int32)
    mask = np.arange(len(ids)) >= len(prompt)
    nothing = np.zeros(len(ids))
    return TrainingSequence(
        token_ids=ids,
        loss_mask=mask,
        behavior_logprobs=nothing.astype(np.float32),
        advantage=1.0,
        token_versions=nothing.astype(np.int64),
        group_key="g",
    )


def shared_batches() -> list[MicroBatch]:
    """Completions that start behind a prompt of the other rank; then one token for two ranks: one has none."""
    long, short = list(range(3, 20)), [5, 4]
    sequences = [rollout(long, 9), rollout(long, 1), rollout(long, 6), rollout(short, 4), rollout(short, 8)]
    (batch,) = pack(sequences, token_budget=100)
    assert batch.layout.shared is not None
    return [batch, filler()]


def score(context: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """log pi, entropy, and this process's part of the gradient of a loss that is not linear in them."""
    model = tiny_model("llama")
    if context is not None:
        model.set_attn_implementation(register_attention(sharded_backend(choose_backend(None), context)))
    outcome = {}
    for number, batch in enumerate(shared_batches()):
        logprobs_T, entropy_T = packed_logprobs(model, batch, temperature=0.8, context=context)
        (logprobs_T.square() - entropy_T * logprobs_T).sum().backward()
        outcome[f"logprobs {number}"], outcome[f"entropy {number}"] = logprobs_T.detach(), entropy_T.detach()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(gradients) == len(list(model.parameters())), "FSDP waits for every parameter's gradient"
    return {**outcome, **gradients}


def score_sharded(_: Ranks) -> dict[str, Tensor]:
    return score(world())


def test_log_probabilities_and_their_gradient_are_those_of_one_process(tmp_path: Path) -> None:
    expected, (first, second) = score(None), run_ranks(tmp_path, 2, score_sharded)
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    assert int((expected["logprobs 0"] != 0).sum()) == 28
    for name, whole in expected.items():
        if name.startswith(("logprobs", "entropy")):
            torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
            torch.testing.assert_close(first[name], whole, rtol=1e-5, atol=1e-5)
        else:
            torch.testing.assert_close(first[name] + second[name], whole, rtol=1e-4, atol=1e-4)


def test_a_model_is_refused_before_it_is_loaded() -> None:
    check_heads(tiny_model(), 2)
    with pytest.raises(ConfigError, match=r"over 4 ranks cannot divide 4 attention heads and 2 key-value heads"):
        check_heads(tiny_model(), 4)


def test_a_rank_is_planned_with_its_part_of_the_activations() -> None:
    half = plan_memory(tiny_model(), LearnerConfig(micro_batch_tokens=64), "cpu", world_size=2, context_size=2)
    assert half == plan_memory(tiny_model(), LearnerConfig(micro_batch_tokens=32), "cpu", world_size=2)


def attend_with_one_kv_head(_: Ranks) -> str:
    inputs = [shard_tokens(each, world()) for each in states(1)[:3]]
    try:
        ulysses(sdpa_attention, world())(*inputs, layout_of(micro_batch(LENGTHS)), SCORES)
    except ConfigError as error:
        return str(error)
    return "no error"


def test_heads_that_cannot_be_divided_are_an_error(tmp_path: Path) -> None:
    for message in run_ranks(tmp_path, 2, attend_with_one_kv_head):
        assert message == (
            "context parallelism over 2 ranks cannot divide 4 attention heads and 1 key-value heads: "
            "set learner.context_parallel to a number that divides both"
        )


@pytest.mark.parametrize(("tokens", "ranks"), [(27, 2), (16, 4), (1, 1)])
def test_shards_are_even_and_as_tensor_split_makes_them(tokens: int, ranks: int) -> None:
    assert shard_sizes(tokens, ranks) == [len(part) for part in torch.arange(tokens).tensor_split(ranks)]


def test_no_rank_is_without_tokens() -> None:
    assert shard_sizes(3, 4) == [1, 1, 1, 1]
