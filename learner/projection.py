"""log pi and entropy of chosen tokens from hidden states, without the logits of all of them.

S positions, V vocabulary, E hidden size, C columns: a run of consecutive token ids. Where S * V logits are too many,
the output layer is applied to C columns at a time, in the forward and again in the backward pass, as an online
softmax (arXiv:1805.02867). Cutting the vocabulary and not the positions, each row of the weight's gradient is
finished by one multiplication, and the layer is cast to the compute type C rows at a time. Up to a limit, the first
logits stay from the forward to the backward pass, which saves one multiplication of four.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lambdapo_async.errors import ConfigError
from learner.online_softmax import (
    Chunk,
    Passes,
    Shaping,
    SoftmaxState,
    Upstream,
    fold_chunk,
    grad_of_output,
)

CHUNK_LOGITS = {"cpu": 2**20, "cuda": 2**26}
"""Logits that are worked on at once, by device: what a core's cache holds (4 MiB), what fills a GPU (128 MiB in
bfloat16)."""
KEPT_LOGITS = {"cpu": 0, "cuda": 5 * 2**28}
"""Logits that the backward pass need not compute again, by device: none where the memory is a laptop's, and 2.5 GiB in
bfloat16, which are 8,192 positions at V = 151,936."""
ALIGNMENT = 64
"""Columns are cut at multiples of this: matrices with odd strides take a GPU twice the time."""


def project(
    head: nn.Linear,
    hidden_SE: Tensor,
    target_S: Tensor,
    *,
    temperature: float,
    soft_cap: float | None = None,
    chunk_logits: int,
    kept_logits: int = 0,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of its distribution, both with gradient.

    Logits are ``head(hidden) / temperature`` in the type that autocast or ``hidden_SE`` says, everything after them
    in float32 or better. Gradients flow to hidden states, weight and bias, where these want one. The layer's own
    ``forward`` and hooks are not called, so its parameters must be whole: under FSDP2 call this inside the
    ``forward`` of the module that shards them (:class:`learner.logprobs.LogprobModel`).

    Args:
        head: output layer, weight [V, E] and bias [V] or None.
        hidden_SE: floating, on the layer's device.
        target_S: int64 token ids below V.
        temperature: of the softmax, above 0.
        soft_cap: c in c tanh(logit / c), which comes before the temperature (Gemma 2, arXiv:2408.00118); None for
            most models.
        chunk_logits: most logits that are worked on at once, ``CHUNK_LOGITS`` of the device; one column of S is the
            least.
        kept_logits: most logits that are kept, in the compute type, until the backward pass.

    Returns:
        ``logprobs_S`` and ``entropy_S`` in nats, float32, or float64 when computed in float64.

    Raises:
        ConfigError: the layer does more than multiply and add, as one with LoRA adapters does.
    """
    if type(head) is not nn.Linear:
        raise ConfigError(
            f"the output layer is a {type(head).__name__}, but only a plain Linear can be trained without storing "
            "all logits: leave the output layer out of the adapter's target modules"
        )
    shaping = Shaping(temperature, soft_cap)
    if len(hidden_SE) * head.out_features <= chunk_logits:
        return _project_at_once(head, hidden_SE, target_S, shaping)
    device = hidden_SE.device.type
    if torch.is_autocast_enabled(device):
        hidden_SE = hidden_SE.to(torch.get_autocast_dtype(device))
    limits = _Limits(chunk_logits, kept_logits if torch.is_grad_enabled() else 0)
    with torch.autocast(device, enabled=False):
        logprobs_S, entropy_S = _Projection.apply(  # type: ignore[no-untyped-call]
            hidden_SE, head.weight, head.bias, target_S, shaping, limits
        )
    return logprobs_S, entropy_S


def _project_at_once(head: nn.Linear, hidden_SE: Tensor, target_S: Tensor, shaping: Shaping) -> tuple[Tensor, Tensor]:
    """The definition. Few logits are better kept: computing them again takes a third more time (a CPU, V = 98)."""
    log_p_SV = shaping(head(hidden_SE), overwrites=True).log_softmax(dim=-1)
    return log_p_SV.gather(1, target_S[:, None])[:, 0], -(log_p_SV.exp() * log_p_SV).sum(dim=-1)


@dataclass(frozen=True, slots=True)
class _Limits:
    """Logits that may exist."""

    chunk: int
    """Worked on at once."""
    kept: int
    """From the forward to the backward pass."""


def _chunks(
    hidden_SE: Tensor, weight_VE: Tensor, bias_V: Tensor | None, target_S: Tensor, limits: _Limits, kept: deque[Tensor]
) -> Iterator[tuple[slice, Tensor, Chunk]]:
    """The columns, their [C, E] rows of the weight in the compute type, and what the layer says of them.

    The first ones said so before and were ``kept``; they are taken from there.
    """
    step = max(1, limits.chunk // len(target_S))
    step -= step % ALIGNMENT if step > ALIGNMENT else 0
    for columns in (slice(start, start + step) for start in range(0, len(weight_VE), step)):
        weight_CE = weight_VE[columns].to(hidden_SE.dtype)
        if kept:
            output_SC = kept.popleft()
        else:
            bias_C = None if bias_V is None else bias_V[columns].to(hidden_SE.dtype)
            output_SC = nn.functional.linear(hidden_SE, weight_CE, bias_C)
        yield columns, weight_CE, Chunk(output_SC, target_S - columns.start)


def _passes(hidden_SE: Tensor) -> Passes:
    """The kernels of the device where there are any."""
    if hidden_SE.is_cuda and hidden_SE.dtype != torch.float64:
        from learner.softmax_kernels import PASSES  # Triton comes with torch's builds for GPUs alone

        return PASSES
    return Passes(fold_chunk, grad_of_output)


class _Projection(torch.autograd.Function):
    """(hidden, weight, bias, target, shaping, limits) -> (logprobs, entropy)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_SE: Tensor,
        weight_VE: Tensor,
        bias_V: Tensor | None,
        target_S: Tensor,
        shaping: Shaping,
        limits: _Limits,
    ) -> tuple[Tensor, Tensor]:
        state, fold = SoftmaxState.before(hidden_SE), _passes(hidden_SE).fold
        kept, room = deque[Tensor](), limits.kept
        for _, _, chunk in _chunks(hidden_SE, weight_VE, bias_V, target_S, limits, deque()):
            fold(state, chunk, shaping)
            room -= chunk.output_SC.numel()
            if room >= 0:
                kept.append(chunk.output_SC)
        logprobs_S, entropy_S, log_sum_S = state.results()
        ctx.save_for_backward(hidden_SE, weight_VE, bias_V, target_S, log_sum_S, entropy_S)
        ctx.shaping, ctx.limits, ctx.kept = shaping, limits, kept
        ctx.set_materialize_grads(False)  # None tells that the loss has no entropy term
        return logprobs_S, entropy_S

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs_S: Tensor | None, grad_entropy_S: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        hidden_SE, weight_VE, bias_V, target_S, log_sum_S, entropy_S = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, deque()  # a chunk's gradient overwrites it: they last for one pass, if it fails, too
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        upstream = Upstream(
            torch.zeros_like(log_sum_S) if grad_logprobs_S is None else grad_logprobs_S / ctx.shaping.temperature,
            None if grad_entropy_S is None else grad_entropy_S / ctx.shaping.temperature,
            log_sum_S,
            entropy_S,
        )
        grad_hidden_SE = torch.zeros_like(hidden_SE, dtype=log_sum_S.dtype) if wants_hidden else None
        grad_weight_VE = torch.empty_like(weight_VE) if wants_weight else None
        grad_bias_V = torch.empty_like(bias_V) if wants_bias else None
        grad_of = _passes(hidden_SE).grad
        with torch.autocast(hidden_SE.device.type, enabled=False):
            for columns, weight_CE, chunk in _chunks(hidden_SE, weight_VE, bias_V, target_S, ctx.limits, kept):
                grad_SC = grad_of(upstream, chunk, ctx.shaping)
                if grad_bias_V is not None:
                    grad_bias_V[columns] = grad_SC.sum(dim=0, dtype=log_sum_S.dtype)
                if grad_weight_VE is not None:
                    grad_weight_VE[columns] = grad_SC.T @ hidden_SE
                if grad_hidden_SE is not None:
                    grad_hidden_SE += grad_SC @ weight_CE
        return (
            None if grad_hidden_SE is None else grad_hidden_SE.to(hidden_SE.dtype),
            grad_weight_VE,
            grad_bias_V,
            None,
            None,
            None,
        )
