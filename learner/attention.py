"""Packed causal attention behind one name of transformers' attention interface.

T packed tokens of N documents, L tokens in the longest one, H query heads, D head size. Documents never see
each other and no [T, T] mask is ever built: a model runs unpatched with ``input_ids`` [1, T],
``position_ids`` [1, T] that restart per document, and ``layout=PackedLayout(...)``, which transformers hands
down to every attention layer.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from lambdapo_async.errors import UserError

FLASH_CAPABILITY = (8, 0)
"""Oldest CUDA compute capability (Ampere) that the varlen kernels run on."""


@dataclass(frozen=True)
class PackedLayout:
    """Where each document lies in a micro-batch; made once, read by every layer."""

    cu_seqlens: Tensor
    """[N + 1] int32 first token of each document, then T."""
    max_seqlen: int

    @cached_property
    def padded(self) -> tuple[Tensor, Tensor]:
        """Token of each slot of the right-padded [N, L] batch, flat, and slot of each of the T tokens; int64."""
        starts, lengths = self.cu_seqlens[:-1].long(), self.cu_seqlens.diff()
        column = torch.arange(self.max_seqlen, device=self.cu_seqlens.device)
        is_token = column < lengths[:, None]
        # Padding repeats token 0: causality hides it from real tokens, and its own output is never read.
        token_of_slot = torch.where(is_token, starts[:, None] + column, 0).flatten()
        return token_of_slot, is_token.flatten().nonzero()[:, 0]


Kernel = Callable[[Tensor, Tensor, Tensor, PackedLayout, float], Tensor]
"""(query [T, H, D], key and value [T, H_kv, D], layout, scaling) -> [T, H, D]."""


def select_attention(device: torch.device) -> str:
    """Register the best kernel for ``device``; returns the name for ``attn_implementation``.

    A CUDA device takes flash-attn when it is installed (a broken installation raises its own ImportError),
    else torch's varlen kernel; a CPU, or a GPU older than Ampere, takes SDPA over right-padded documents.
    """
    name, kernel = _choose(device)
    AttentionInterface.register(name, partial(_attention_layer, kernel))
    return name


def _choose(device: torch.device) -> tuple[str, Kernel]:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FLASH_CAPABILITY:
        return "lambdapo_padded", padded_attention
    if find_spec("flash_attn") is not None:
        return "lambdapo_packed", _flash_kernel(importlib.import_module("flash_attn").flash_attn_varlen_func)
    return "lambdapo_varlen", varlen_attention


def padded_attention(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scaling: float) -> Tensor:
    """SDPA over documents right-padded to the longest; shapes as in ``Kernel``."""
    token_of_slot, slot_of_token = layout.padded
    num_documents = layout.cu_seqlens.shape[0] - 1

    def pad(packed: Tensor) -> Tensor:
        slots = packed.flatten(1).index_select(0, token_of_slot)
        return slots.view(num_documents, layout.max_seqlen, *packed.shape[1:]).transpose(1, 2)

    grouped = query.shape[1] != key.shape[1]
    output_NHLD = functional.scaled_dot_product_attention(
        pad(query), pad(key), pad(value), is_causal=True, scale=scaling, enable_gqa=grouped
    )
    return output_NHLD.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, slot_of_token).view(query.shape)


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scaling: float) -> Tensor:
    """torch's own FlashAttention over packed documents; shapes as in ``Kernel``."""
    marks, longest = layout.cu_seqlens, layout.max_seqlen
    return varlen_attn(
        query, key, value, marks, marks, longest, longest,
        scale=scaling, window_size=(-1, 0), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


def _flash_kernel(flash_attn_varlen_func: Callable[..., Tensor]) -> Kernel:
    def flash_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scaling: float) -> Tensor:
        marks, longest = layout.cu_seqlens, layout.max_seqlen
        return flash_attn_varlen_func(q, k, v, marks, marks, longest, longest, softmax_scale=scaling, causal=True)

    return flash_attention


def _attention_layer(  # noqa: PLR0913 - the signature is transformers'
    kernel: Kernel,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: PackedLayout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """One layer's attention as transformers calls it: query [1, H, T, D] -> [1, T, H, D].

    transformers passes more keywords (dropout, position ids, output switches), none of which changes the
    result of a model in evaluation mode; those that would are refused.
    """
    windowed = sliding_window is not None and sliding_window < layout.max_seqlen
    if windowed or softcap is not None or s_aux is not None or attention_mask is not None:
        raise UserError(
            f"{type(module).__name__} needs a mask, sliding window ({sliding_window}), soft cap ({softcap}) or "
            "attention sinks, which packed training does not support: choose a model with plain causal attention"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Under autocast a norm with float32 weights leaves query and key in float32; the kernels want one type.
    packed = (states[0].transpose(0, 1).to(value.dtype) for states in (query, key, value))
    return kernel(*packed, layout, scale).unsqueeze(0), None
