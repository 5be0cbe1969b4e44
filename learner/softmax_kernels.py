"""The passes over a chunk of logits on a GPU, each as one Triton kernel that reads every logit once.

S positions, C columns of the vocabulary. As a chain of torch operations either pass moves ten times the bytes, and at
V = 151,936 takes longer than the multiplications. ``learner.online_softmax`` holds the formulas, on any device.
"""

import triton
import triton.language as tl
from torch import Tensor

from learner.online_softmax import LOWEST, Chunk, Passes, Shaping, SoftmaxState, Upstream

BLOCK = 4096
"""Logits of a row that a program holds at once."""
NUM_WARPS = 8
_LOWEST = tl.constexpr(LOWEST)


def fold_chunk(state: SoftmaxState, chunk: Chunk, shaping: Shaping) -> None:
    """``online_softmax.fold_chunk`` in one pass."""
    _fold[(len(chunk.output_SC),)](
        chunk.output_SC,
        chunk.column_S,
        state.peak_S,
        state.mass_S,
        state.moment_S,
        state.target_logit_S,
        chunk.output_SC.shape[1],
        1.0 / shaping.temperature,
        shaping.soft_cap or 0.0,
        HAS_CAP=shaping.soft_cap is not None,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )


def grad_of_output(upstream: Upstream, chunk: Chunk, shaping: Shaping) -> Tensor:
    """``online_softmax.grad_of_output`` in one pass, which overwrites the layer's output with its gradient."""
    num_positions, num_columns = chunk.output_SC.shape
    _grad[(num_positions, triton.cdiv(num_columns, BLOCK))](
        chunk.output_SC,
        chunk.column_S,
        upstream.grad_logprobs_S,
        upstream.grad_logprobs_S if upstream.grad_entropy_S is None else upstream.grad_entropy_S,
        upstream.log_sum_S,
        upstream.entropy_S,
        num_columns,
        1.0 / shaping.temperature,
        shaping.soft_cap or 0.0,
        HAS_CAP=shaping.soft_cap is not None,
        HAS_ENTROPY=upstream.grad_entropy_S is not None,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return chunk.output_SC


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _capped(output, cap):  # type: ignore[no-untyped-def]
    """tanh(output / cap), which Triton has no name for that runs on every backend."""
    return 2.0 * tl.sigmoid(2.0 * output / cap) - 1.0


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _fold(  # type: ignore[no-untyped-def] # noqa: PLR0913 - a kernel's arguments are its tensors
    output_ptr,
    column_ptr,
    peak_ptr,
    mass_ptr,
    moment_ptr,
    target_ptr,
    num_columns,
    inverse_temperature,
    cap,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.load(column_ptr + row)
    peak, mass, moment = tl.load(peak_ptr + row), tl.load(mass_ptr + row), tl.load(moment_ptr + row)
    target = tl.load(target_ptr + row)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < num_columns
        logits = tl.load(output_ptr + row * num_columns + columns, mask=inside, other=0.0).to(tl.float32)
        if HAS_CAP:
            logits = cap * _capped(logits, cap)
        logits = logits * inverse_temperature
        target += tl.sum(tl.where(columns == column, logits, 0.0), axis=0)
        higher = tl.maximum(peak, tl.max(tl.where(inside, logits, _LOWEST), axis=0))
        exponent = logits - higher
        weight = tl.where(inside, tl.exp(exponent), 0.0)
        shift = peak - higher
        scale = tl.exp(shift)
        moment = scale * (moment + shift * mass) + tl.sum(weight * exponent, axis=0)
        mass = scale * mass + tl.sum(weight, axis=0)
        peak = higher
    tl.store(peak_ptr + row, peak)
    tl.store(mass_ptr + row, mass)
    tl.store(moment_ptr + row, moment)
    tl.store(target_ptr + row, target)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _grad(  # type: ignore[no-untyped-def] # noqa: PLR0913 - a kernel's arguments are its tensors
    output_ptr,
    column_ptr,
    grad_logprob_ptr,
    grad_entropy_ptr,
    log_sum_ptr,
    entropy_ptr,
    num_columns,
    inverse_temperature,
    cap,
    HAS_CAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    place = output_ptr + row * num_columns + columns
    logits = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    slope = 1.0
    if HAS_CAP:
        share = _capped(logits, cap)
        logits = cap * share
        slope = 1.0 - share * share
    grad_logprob = tl.load(grad_logprob_ptr + row)
    log_p = logits * inverse_temperature - tl.load(log_sum_ptr + row)
    grad = -grad_logprob
    if HAS_ENTROPY:
        grad -= tl.load(grad_entropy_ptr + row) * (log_p + tl.load(entropy_ptr + row))
    grad = grad * tl.exp(log_p) + tl.where(columns == tl.load(column_ptr + row), grad_logprob, 0.0)
    tl.store(place, (grad * slope).to(output_ptr.dtype.element_ty), mask=inside)


PASSES = Passes(fold_chunk, grad_of_output)
"""For CUDA, bfloat16 to float32."""
