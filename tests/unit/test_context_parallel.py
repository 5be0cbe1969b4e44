"""Attention over ranks that hold a part of the tokens each, against one process that holds all."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lambdapo_async.errors import ConfigError
from lambdapo_async.packed_layout import Segment, packed_layout
from learner.attention import register_attention
from learner.attention_kernels import Scores, choose_backend, sdpa_attention
from learner.context_parallel import shard_sizes, shard_tokens, sharded_backend, ulysses
from learner.parallel import Ranks
from tests.ranks import run_ranks
from tests.tiny_models import layout_of, micro_batch, tiny_model

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
            "choose a number of ranks that divides both"
        )


@pytest.mark.parametrize(("tokens", "ranks"), [(27, 2), (5, 8), (16, 4), (1, 3)])
def test_shards_are_even_and_as_tensor_split_makes_them(tokens: int, ranks: int) -> None:
    assert shard_sizes(tokens, ranks) == [len(part) for part in torch.arange(tokens).tensor_split(ranks)]
