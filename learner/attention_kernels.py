"""Causal attention over packed segments: one signature, one function per implementation.

T packed tokens in N segments with K keys, H query heads, H_kv key and value heads, D head size. Documents never see
each other and no [T, T] mask is ever built; see ``lambdapo_async.packed_layout``.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn

from lambdapo_async.errors import UserError
from lambdapo_async.packed_layout import PackedLayout
from learner import flash4

Capability = tuple[int, int]
"""CUDA compute capability: (8, 0) Ampere, (9, 0) Hopper, (10, 0) Blackwell."""

GROUPED_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""torch 2.11 takes fewer key heads than query heads as they come, later versions want to be told."""

VARLEN_HEAD = 256
"""Largest head of torch's varlen kernel."""

VARLEN_CAPABILITY: Capability = (8, 0)
"""Oldest GPU that torch's varlen kernel runs on."""


@dataclass(frozen=True, slots=True)
class Scores:
    """How attention scores come from query . key."""

    scale: float
    window: int | None = None
    """Newest tokens before it that a token sees, itself included; None is all."""
    softcap: float | None = None
    """c in c * tanh(score / c), after scaling; None is no cap."""


Kernel = Callable[[Tensor, Tensor, Tensor, PackedLayout, Scores], Tensor]
"""(query [T, H, D], key and value [T, H_kv, D], layout, scores) -> [T, H, D]."""


@dataclass(frozen=True, slots=True)
class Backend:
    """An implementation of attention."""

    name: str
    """Name for ``attn_implementation``; transformers takes any with "flash" in it for its own."""
    kernel: Kernel
    softcap: bool
    """It can cap scores; where False, ``Scores.softcap`` must be None."""
    narrow: tuple[int, int] | None = None
    """Head sizes of key and value that it takes as they are; all other values must be as wide as their keys."""


def sdpa_attention(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scores: Scores) -> Tensor:
    """torch's SDPA, one call per run of segments alike: views, without padding.

    Fewer queries than keys, or a window shorter than the keys, cost a boolean mask of one segment; shapes as in
    ``Kernel``.
    """
    queries = torch.split(query, [segments * tokens for segments, tokens, _ in layout.runs])
    sizes = [segments * keys for segments, _, keys in layout.runs]
    keys, values = (torch.split(gathered(states, layout), sizes) for states in (key, value))
    runs = zip(layout.runs, queries, keys, values, strict=True)
    return torch.cat([_sdpa_run(shape, query, key, value, scores) for shape, query, key, value in runs])


def _sdpa_run(shape: tuple[int, int, int], query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    """[segments * tokens, H, D] attention of segments alike."""
    segments, tokens, keys = shape
    is_causal = tokens == keys and (scores.window is None or scores.window >= keys)

    def batched(states: Tensor) -> Tensor:
        return states.view(segments, -1, *states.shape[1:]).transpose(1, 2)

    output_nHLD = functional.scaled_dot_product_attention(
        batched(query),
        batched(key),
        batched(value),
        attn_mask=None if is_causal else _band(tokens, keys, scores.window, query.device),
        is_causal=is_causal,
        scale=scores.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output_nHLD.transpose(1, 2).flatten(0, 1)


def _band(tokens: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[tokens, keys] bool: query (row) sees key (column); the last query lies at the last key."""
    position = torch.arange(keys, device=device)
    distance = position[keys - tokens :, None] - position
    return (distance >= 0) & (distance < (window or keys))


def gathered(states: Tensor, layout: PackedLayout) -> Tensor:
    """[T, H_kv, D] keys or values of the tokens -> [K, H_kv, D] of the segments; views where no prompt is shared."""
    if layout.shared is None:
        return states
    rows: Tensor = _Gather.apply(states, layout.shared.index_K)  # type: ignore[no-untyped-call]
    return rows


class _Gather(torch.autograd.Function):
    """Rows by number; the gradients of a row that was taken several times are added in float32 at least."""

    @staticmethod
    def forward(ctx: FunctionCtx, states: Tensor, index_K: Tensor) -> Tensor:
        ctx.save_for_backward(index_K)
        ctx.num_rows = len(states)  # type: ignore[attr-defined]
        return states.index_select(0, index_K)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        (index_K,) = ctx.saved_tensors  # type: ignore[attr-defined]
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        total = wide.new_zeros(ctx.num_rows, *gradient.shape[1:]).index_add_(0, index_K, wide)  # type: ignore[attr-defined]
        return total.to(gradient.dtype), None


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scores: Scores) -> Tensor:
    """torch's own FlashAttention over packed segments; shapes as in ``Kernel``."""
    attend = partial(varlen_attn, enable_gqa=query.shape[1] != key.shape[1]) if GROUPED_HEADS else varlen_attn
    output = attend(
        query, gathered(key, layout), gathered(value, layout),
        layout.cu_seqlens, layout.key_marks, layout.max_seqlen, layout.max_keys,
        scale=scores.scale,
        window_size=(-1 if scores.window is None else scores.window - 1, 0),
    )  # fmt: skip
    assert isinstance(output, Tensor)  # a pair only when the log-sum-exp is asked for
    return output


def flash_attention(flash_attn_varlen_func: Callable[..., object], *, unbounded: int | None) -> Kernel:
    """A kernel from any generation's ``flash_attn_varlen_func``, whose keywords are the same since version 2.6.

    Args:
        flash_attn_varlen_func: version 2 returns the output, version 4 a pair with the log-sum-exp, version 3 either.
        unbounded: how that generation writes a window without left bound.
    """

    def kernel(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scores: Scores) -> Tensor:
        result = flash_attn_varlen_func(
            query,
            gathered(key, layout),
            gathered(value, layout),
            cu_seqlens_q=layout.cu_seqlens,
            cu_seqlens_k=layout.key_marks,
            max_seqlen_q=layout.max_seqlen,
            max_seqlen_k=layout.max_keys,
            softmax_scale=scores.scale,
            causal=True,
            window_size=(unbounded if scores.window is None else scores.window - 1, 0),
            softcap=scores.softcap or 0.0,
        )
        output = result[0] if isinstance(result, tuple) else result
        assert isinstance(output, Tensor)
        return output

    return kernel


def torchs_otherwise(kernel: Kernel, takes: Callable[[int, int, bool], bool]) -> Kernel:
    """``kernel`` where it takes (head size, value head size, no window and no cap), else torch's.

    Raises:
        UserError: (from the kernel) neither can.
    """
    torchs = varlen_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scores: Scores) -> Tensor:
        size, value_size = query.shape[-1], value.shape[-1]
        if takes(size, value_size, scores.window is None and scores.softcap is None):
            return kernel(query, key, value, layout, scores)
        if scores.softcap is not None or size > VARLEN_HEAD:
            capped = "" if scores.softcap is None else f" with scores capped at {scores.softcap}"
            raise UserError(
                f"neither flash-attn 4 nor torch can train attention heads of {size}{capped} on this GPU: "
                "install flash-attn in place of flash-attn-4, or choose another model"
            )
        return torchs(query, key, value, layout, scores)

    return attend


@dataclass(frozen=True, slots=True)
class FlashPackage:
    """One generation of the flash-attn packages."""

    name: str
    module: str
    """Where ``flash_attn_varlen_func`` is."""
    oldest: Capability
    """First GPU that its forward and backward run on."""
    beyond: Capability | None
    """First GPU that they no longer run on."""
    unbounded: int | None
    interface: str | None = None
    """Where ``_flash_attn_bwd`` is, if its function is Python, at which a compiled layer would have to stop."""


FLASH_PACKAGES = (
    FlashPackage("lambdapo_fa4", "flash_attn.cute", (9, 0), None, None, "flash_attn.cute.interface"),
    FlashPackage("lambdapo_fa3", "flash_attn_interface", (9, 0), (10, 0), -1),
    # Not flash_attn itself: without version 2 but with version 4 that is an empty namespace.
    FlashPackage("lambdapo_fa2", "flash_attn.flash_attn_interface", (8, 0), None, -1),
)
"""Newest first."""


def installed_module(name: str) -> ModuleType | None:
    """A module, or None when its package is not installed; an installation that does not load raises its own error."""
    package = name.partition(".")[0]
    if find_spec(package) is None or find_spec(name) is None:
        return None
    return importlib.import_module(name)


def choose_backend(
    capability: Capability | None, load: Callable[[str], ModuleType | None] = installed_module
) -> Backend:
    """The best implementation that is present.

    Args:
        capability: of the GPU; None on a CPU.
        load: module name -> module, None where it is not installed.
    """
    if capability is None or capability < VARLEN_CAPABILITY:
        return Backend("lambdapo_sdpa", sdpa_attention, softcap=False)
    for package in FLASH_PACKAGES:
        runs_here = capability >= package.oldest and (package.beyond is None or capability < package.beyond)
        module = load(package.module) if runs_here else None
        if module is not None:
            function = module.flash_attn_varlen_func
            if package.interface is not None and (interface := load(package.interface)) is not None:
                return _flash4_backend(package, capability, flash4.as_operator(function, interface._flash_attn_bwd))
            return Backend(package.name, flash_attention(function, unbounded=package.unbounded), softcap=True)
    return Backend("lambdapo_varlen", varlen_attention, softcap=False)


def _flash4_backend(package: FlashPackage, capability: Capability, function: Callable[..., Tensor]) -> Backend:
    takes = partial(flash4.takes, capability)
    kernel = torchs_otherwise(flash_attention(function, unbounded=package.unbounded), takes)
    return Backend(package.name, kernel, softcap=True, narrow=flash4.NARROW if takes(*flash4.NARROW, False) else None)
