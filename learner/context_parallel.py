"""Attention when the tokens of one micro-batch are spread over several ranks (DeepSpeed-Ulysses, arXiv:2309.14509).

T packed tokens of which this rank holds t, P ranks, H query heads, H_kv key and value heads, D head size. Everything
but attention works on single tokens and needs no change; around attention, ranks exchange "all heads of my tokens"
for "my heads of all tokens", so that any kernel runs exact and unchanged on whole documents, shared prompts included.
What a rank finds of its tokens is added up at the end, and all ranks compute the same loss of it.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional
from transformers import PreTrainedModel

from lambdapo_async.errors import ConfigError
from lambdapo_async.packed_layout import PackedLayout
from learner.attention_kernels import Backend, Kernel, Scores


def shard_sizes(num_tokens: int, world_size: int) -> list[int]:
    """Tokens of each rank: they differ by at most one, and the first ranks have more.

    Fewer tokens than ranks are padded to one for each, for many models fail without tokens.
    """
    num_tokens = max(num_tokens, world_size)
    return [num_tokens // world_size + (rank < num_tokens % world_size) for rank in range(world_size)]


def own_tokens(num_tokens: int, group: dist.ProcessGroup) -> slice:
    """The tokens of this rank; padding lies beyond ``num_tokens``."""
    sizes = shard_sizes(num_tokens, group.size())
    start = sum(sizes[: group.rank()])
    return slice(start, start + sizes[group.rank()])


def shard_tokens(states_T: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[T, ...] on every rank -> the [t, ...] of this rank: what the model is fed, positions included."""
    num_tokens = len(states_T)
    missing = max(0, group.size() - num_tokens)
    return torch.cat([states_T, states_T.new_zeros(missing, *states_T.shape[1:])])[own_tokens(num_tokens, group)]


def add_parts(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the group of tensors of one shape, of which every rank must compute the same loss.

    That loss is one, though all ranks compute it: to each rank flows the gradient of its own part, once.
    """
    total: Tensor = _Sum.apply(part, group)  # type: ignore[no-untyped-call]
    return total


def check_heads(model: PreTrainedModel, num_ranks: int) -> None:
    """Refuse, with ``ConfigError``, a model whose heads cannot be divided among ``num_ranks``."""
    text = model.config.get_text_config()
    heads: int = text.num_attention_heads
    _check_divisible(heads, text.to_dict().get("num_key_value_heads") or heads, num_ranks)


def sharded_backend(backend: Backend, group: dist.ProcessGroup) -> Backend:
    """``backend`` for a model that is fed :func:`shard_tokens`, under a name of its own."""
    return Backend(f"{backend.name}_ulysses", ulysses(backend.kernel, group), backend.softcap)


def ulysses(kernel: Kernel, group: dist.ProcessGroup) -> Kernel:
    """A kernel on this rank's [t, H, D] queries and [t, H_kv, D] keys and values, with the layout of all T tokens.

    Gradients of a model's parameters are those of this rank's tokens: sum them over the group.

    Raises:
        ConfigError: (from the kernel) the heads cannot be divided among the ranks.
    """
    world_size = group.size()

    def sharded(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scores: Scores) -> Tensor:
        heads, kv_heads = query.shape[1], key.shape[1]
        _check_divisible(heads, kv_heads, world_size)
        sizes = shard_sizes(layout.num_tokens, world_size)
        shares = [heads // world_size, kv_heads // world_size, kv_heads // world_size]
        # One exchange for all three: every rank's share of query, key and value heads, side by side.
        parts = [
            states.reshape(len(states), world_size, share, states.shape[2])
            for states, share in zip((query, key, value), shares, strict=True)
        ]
        mine_ThD = _tokens_for_heads(torch.cat(parts, dim=2), sizes, group)
        num_padding = len(mine_ThD) - layout.num_tokens
        my_query, my_key, my_value = torch.split(mine_ThD[: layout.num_tokens], shares, dim=1)
        output_ThD = kernel(my_query, my_key, my_value, layout, scores)
        return _heads_for_tokens(functional.pad(output_ThD, (0, 0, 0, 0, 0, num_padding)), sizes, group)

    return sharded


def _check_divisible(heads: int, kv_heads: int, num_ranks: int) -> None:
    if heads % num_ranks or kv_heads % num_ranks:
        raise ConfigError(
            f"context parallelism over {num_ranks} ranks cannot divide {heads} attention heads and {kv_heads} "
            "key-value heads: set learner.context_parallel to a number that divides both"
        )


def _tokens_for_heads(states_tPhD: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """[t, P, h, D], entry p for rank p -> [T, h, D]."""
    sent = [states_tPhD.shape[0]] * len(sizes)
    rows = states_tPhD.transpose(0, 1).flatten(0, 1)
    exchanged: Tensor = _Exchange.apply(rows, sent, sizes, group)  # type: ignore[no-untyped-call]
    return exchanged


def _heads_for_tokens(states_ThD: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """[T, h, D] -> [t, P * h, D]."""
    tokens = sizes[group.rank()]
    received: Tensor = _Exchange.apply(  # type: ignore[no-untyped-call]
        states_ThD, sizes, [tokens] * len(sizes), group
    )
    return received.view(len(sizes), tokens, *states_ThD.shape[1:]).transpose(0, 1).flatten(1, 2)


class _Exchange(torch.autograd.Function):
    """Rows to every rank and from every rank; the gradient takes the way back."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.route = sent, received, group  # type: ignore[attr-defined]
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        sent, received, group = ctx.route  # type: ignore[attr-defined]
        return _all_to_all(gradient, received, sent, group), None, None, None


class _Sum(torch.autograd.Function):
    """Sum over the group; backward is the identity, not another sum."""

    @staticmethod
    def forward(ctx: FunctionCtx, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    output = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(output, rows.contiguous(), received, sent, group=group)
    return output
