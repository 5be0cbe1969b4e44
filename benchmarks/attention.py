"""Attention kernels against each other on packed documents, forward and backward; needs a GPU of Ampere or newer."""

import time
from collections.abc import Callable
from types import ModuleType

import torch

from benchmarks.model_shapes import ModelShape
from lambdapo_async.packed_layout import PackedLayout
from learner.attention_kernels import (
    FLASH_PACKAGES,
    Backend,
    Scores,
    choose_backend,
    installed_module,
    sdpa_attention,
    varlen_attention,
)

WARM_UP, REPEATS = 2, 5


def available_backends() -> list[Backend]:
    """Every implementation that runs on the current GPU."""
    capability = torch.cuda.get_device_capability()

    def only(wanted: str) -> Callable[[str], ModuleType | None]:
        return lambda name: installed_module(name) if name == wanted else None

    chosen = [choose_backend(capability, only(package.module)) for package in FLASH_PACKAGES]
    varlen = Backend("lambdapo_varlen", varlen_attention, softcap=False)
    sdpa = Backend("lambdapo_sdpa", sdpa_attention, softcap=False)
    return list({backend.name: backend for backend in (*chosen, varlen, sdpa)}.values())


def attention_tflops(backend: Backend, layout: PackedLayout, shape: ModelShape) -> list[float]:
    """10^12 FLOP/s of each forward and backward of one layer over a micro-batch, in bfloat16."""
    torch.manual_seed(0)
    heads = (shape.num_attention_heads, shape.num_key_value_heads, shape.num_key_value_heads)
    states = [
        torch.randn(layout.num_tokens, count, shape.head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for count in heads
    ]
    flops = 6 * shape.num_attention_heads * shape.head_dim * layout.squares
    layout, scores = layout.to(torch.device("cuda")), Scores(shape.head_dim**-0.5)
    return [flops / _seconds(backend, states, layout, scores) / 1e12 for _ in range(WARM_UP + REPEATS)][WARM_UP:]


def _seconds(backend: Backend, states: list[torch.Tensor], layout: PackedLayout, scores: Scores) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    query, key, value = states
    output = backend.kernel(query, key, value, layout, scores)
    torch.autograd.grad(output, states, torch.ones_like(output))
    torch.cuda.synchronize()
    return time.perf_counter() - started
