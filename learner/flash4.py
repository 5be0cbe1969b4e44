"""flash-attn 4 as an operator that torch.compile keeps whole: its own function is Python that builds kernels.

T tokens, K keys, N segments, H query heads, H_kv key and value heads, D head size.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, library
from torch._library.custom_ops import CustomOpDef

NARROW = (192, 128)
"""Head sizes of query and key, and of value, that differ and are taken: multi-head latent attention's."""


def takes(capability: tuple[int, int], size: int, value_size: int, is_plain: bool) -> bool:
    """Whether version 4.0.0b36 runs forward and backward; itself it asserts, and a part in its backward pass only.

    Args:
        capability: the GPU's, (9, 0) or newer.
        size: of a query's and key's head.
        value_size: of a value's head.
        is_plain: scores have neither window nor cap.
    """
    if size % 8 or value_size % 8:
        return False
    largest = max(size, value_size)
    if capability < (10, 0):
        return largest <= 256
    if largest <= 128 or capability >= (12, 0):
        return largest <= 128
    return (size, value_size) == NARROW or (size == value_size == 256 and is_plain)


@cache
def as_operator(
    flash_attn_varlen_func: Callable[..., tuple[Tensor, Tensor]],
    flash_attn_bwd: Callable[..., tuple[Tensor, ...]],
) -> Callable[..., Tensor]:
    """The package's function with the keywords that ``attention_kernels.flash_attention`` gives.

    Args:
        flash_attn_varlen_func: its public function.
        flash_attn_bwd: its ``_flash_attn_bwd``, which torch's own registration of the package calls as well.
    """

    forward, backward = _forward(flash_attn_varlen_func), _backward(flash_attn_bwd)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:3], *output, *inputs[3:5])
        ctx.settings = inputs[5:]

    def differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *backward(gradient, *ctx.saved_tensors, *ctx.settings), *(None,) * 7

    forward.register_autograd(differentiate, setup_context=keep)

    def attend(  # noqa: PLR0913 - the package's keywords
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int | None, int],
        softcap: float,
    ) -> Tensor:
        assert causal
        marks = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        output: Tensor = forward(query, key, value, *marks, softmax_scale, window_size[0], softcap)[0]
        return output

    return attend


def _forward(flash_attn_varlen_func: Callable[..., tuple[Tensor, Tensor]]) -> CustomOpDef:
    """(query, key, value, where segments and their keys lie, scores) -> output [T, H, D], log-sum-exp [H, T]."""

    @library.custom_op("lambdapo::flash4", mutates_args=())
    def forward(  # noqa: PLR0913 - an operator's arguments are its tensors and numbers
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float,
        window: int | None,
        softcap: float,
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            output, log_sum_HT = flash_attn_varlen_func(
                query,
                key,
                value,
                cu_seqlens_q=cu_seqlens_q,
                cu_seqlens_k=cu_seqlens_k,
                max_seqlen_q=max_seqlen_q,
                max_seqlen_k=max_seqlen_k,
                softmax_scale=softmax_scale,
                causal=True,
                window_size=(window, 0),
                softcap=softcap,
                return_lse=True,
            )
        return output.contiguous(), log_sum_HT.contiguous()

    @forward.register_fake
    def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        num_tokens, num_heads, _size = query.shape
        output = query.new_empty((num_tokens, num_heads, value.shape[-1]))
        return output, query.new_empty((num_heads, num_tokens), dtype=torch.float32)

    return forward


def _backward(flash_attn_bwd: Callable[..., tuple[Tensor, ...]]) -> CustomOpDef:
    """(the output's gradient, what :func:`_forward` took and gave) -> the gradients of query, key and value."""

    @library.custom_op("lambdapo::flash4_backward", mutates_args=())
    def backward(  # noqa: PLR0913 - an operator's arguments are its tensors and numbers
        gradient: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        log_sum_HT: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float,
        window: int | None,
        softcap: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradients = flash_attn_bwd(
            query,
            key,
            value,
            output,
            gradient.contiguous(),
            log_sum_HT,
            softmax_scale=softmax_scale,
            causal=True,
            softcap=softcap,
            window_size_left=window,
            window_size_right=0,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
        )
        grad_query, grad_key, grad_value = (each.contiguous() for each in gradients[:3])
        return grad_query, grad_key, grad_value

    @backward.register_fake
    def _(gradient: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (each.new_empty(each.shape) for each in inputs[:3])
        return query, key, value

    return backward
