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
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from lambdapo_async.errors import UserError

FLASH_CAPABILITY = (8, 0)
"""Oldest CUDA compute capability (Ampere) that the varlen kernels run on."""


@dataclass(frozen=True, slots=True)
class PaddedDocuments:
    """Documents of similar length as a right-padded batch of n rows and L columns."""

    token_of_slot: Tensor
    """[n, L] int64 packed token of each slot."""
    is_token: Tensor
    """[n, L] bool; False in the padding."""

    @classmethod
    def of(cls, starts: Tensor, lengths: Tensor) -> Self:
        """From the first token and the length of each document, both [n] int64."""
        column = torch.arange(int(lengths.max()), device=lengths.device)
        is_token = column < lengths[:, None]
        # Padding repeats the first token: causality hides it from real tokens, its own output is never read.
        return cls(starts[:, None] + torch.where(is_token, column, 0), is_token)


@dataclass(frozen=True)
class PackedLayout:
    """Where each document lies in a micro-batch; made once, read by every layer."""

    cu_seqlens: Tensor
    """[N + 1] int32 first token of each document, then T."""
    max_seqlen: int

    @cached_property
    def padded(self) -> tuple[PaddedDocuments, ...]:
        """All documents; lengths within one batch differ by less than a factor of two, so padding stays bounded."""
        starts, lengths = self.cu_seqlens[:-1].long(), self.cu_seqlens.diff().long()
        octaves = lengths.log2().ceil()
        return tuple(PaddedDocuments.of(starts[octaves == o], lengths[octaves == o]) for o in torch.unique(octaves))

    @cached_property
    def slot_of_token(self) -> Tensor:
        """[T] int64 slot of each token in the flattened and concatenated batches of :attr:`padded`."""
        is_token = torch.cat([batch.is_token.flatten() for batch in self.padded])
        tokens = torch.cat([batch.token_of_slot.flatten() for batch in self.padded])[is_token]
        return torch.empty_like(tokens).index_copy(0, tokens, is_token.nonzero()[:, 0])


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
    flash_attention = installed_flash_attention()
    return ("lambdapo_varlen", varlen_attention) if flash_attention is None else ("lambdapo_packed", flash_attention)


def padded_attention(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scaling: float) -> Tensor:
    """SDPA over right-padded documents; shapes as in ``Kernel``."""
    outputs = [_padded_batch(query, key, value, batch.token_of_slot, scaling) for batch in layout.padded]
    return torch.cat(outputs).index_select(0, layout.slot_of_token).view(query.shape)


def _padded_batch(query: Tensor, key: Tensor, value: Tensor, token_of_slot: Tensor, scaling: float) -> Tensor:
    """[n * L, H * D] attention output of every slot."""

    def pad(packed: Tensor) -> Tensor:
        slots = packed.flatten(1).index_select(0, token_of_slot.flatten())
        return slots.view(*token_of_slot.shape, *packed.shape[1:]).transpose(1, 2)

    output_nHLD = functional.scaled_dot_product_attention(
        pad(query), pad(key), pad(value), is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return output_nHLD.transpose(1, 2).flatten(2).flatten(0, 1)


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scaling: float) -> Tensor:
    """torch's own FlashAttention over packed documents; shapes as in ``Kernel``."""
    marks, longest = layout.cu_seqlens, layout.max_seqlen
    grouped = query.shape[1] != key.shape[1]
    output = varlen_attn(
        query, key, value, marks, marks, longest, longest, scale=scaling, window_size=(-1, 0), enable_gqa=grouped
    )
    assert isinstance(output, Tensor)  # a pair only when the log-sum-exp is asked for
    return output


def installed_flash_attention() -> Kernel | None:
    """flash-attn's kernel; None when it is not installed, its own ImportError when it is and does not load."""
    if find_spec("flash_attn") is None:
        return None
    flash_attn_varlen_func = importlib.import_module("flash_attn").flash_attn_varlen_func

    def flash_attention(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scaling: float) -> Tensor:
        marks, longest = layout.cu_seqlens, layout.max_seqlen
        output: Tensor = flash_attn_varlen_func(
            query, key, value, marks, marks, longest, longest, softmax_scale=scaling, causal=True
        )
        return output

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
    query_THD, key_THD, value_THD = (states[0].transpose(0, 1).to(value.dtype) for states in (query, key, value))
    return kernel(query_THD, key_THD, value_THD, layout, scale).unsqueeze(0), None
