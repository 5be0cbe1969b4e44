"""Packed layouts with and without shared prompts, and states to attend over."""

import torch
from torch import Tensor

from lambdapo_async.packed_layout import PackedLayout, Segment, packed_layout
from learner.attention_kernels import Kernel, Scores

LENGTHS = (5, 1, 13, 13, 2, 8)
SHARED = packed_layout(
    [
        *(Segment(length) for length in (9, 4, 4)),
        *(Segment(6, range(9, 13)), Segment(6, range(13, 17)), Segment(6, range(9)), Segment(2, range(9)), Segment(1)),
    ]
)
"""38 tokens: prompts of 9, 4 and 4 with completions, the last two twice as long as those, and a document at the end."""
LAYOUTS = {"documents": packed_layout([Segment(length) for length in LENGTHS]), "shared": SHARED}


def states(lengths: tuple[int, ...], kv_heads: int, size: int, *, heads: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), count, size) for count in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def forward_and_gradients(kernel: Kernel, inputs: list[Tensor], layout: PackedLayout, scores: Scores) -> list[Tensor]:
    output = kernel(*inputs, layout, scores)
    upstream = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output, *torch.autograd.grad(output, inputs, upstream)]
