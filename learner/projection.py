"""log pi and entropy of chosen tokens from hidden states, without the logits of all of them.

S positions, V vocabulary, E hidden size, C columns: a run of consecutive token ids. Where S * V logits are too many,
the output layer is applied to C columns at a time, in the forward and again in the backward pass, as an online
softmax (arXiv:1805.02867). Cutting the vocabulary and not the positions, each row of the weight's gradient is
finished by one multiplication, and the layer is cast to the compute type C rows at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lambdapo_async.errors import ConfigError

CHUNK_LOGITS = {"cpu": 2**20, "cuda": 2**26}
"""Logits that exist at once, by device: what a core's cache holds (4 MiB), what fills a GPU (256 MiB)."""


def project(
    head: nn.Linear,
    hidden_SE: Tensor,
    target_S: Tensor,
    *,
    temperature: float,
    soft_cap: float | None = None,
    chunk_logits: int,
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
        chunk_logits: most logits that exist at once, ``CHUNK_LOGITS`` of the device; one column of S is the least.

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
    shaping = _Shaping(temperature, soft_cap)
    if len(hidden_SE) * head.out_features <= chunk_logits:
        return _project_at_once(head, hidden_SE, target_S, shaping)
    device = hidden_SE.device.type
    if torch.is_autocast_enabled(device):
        hidden_SE = hidden_SE.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        logprobs_S, entropy_S = _Projection.apply(  # type: ignore[no-untyped-call]
            hidden_SE, head.weight, head.bias, target_S, shaping, chunk_logits
        )
    return logprobs_S, entropy_S


@dataclass(frozen=True, slots=True)
class _Shaping:
    """What the layer's output goes through before the softmax."""

    temperature: float
    soft_cap: float | None

    def __call__(self, output: Tensor) -> Tensor:
        """Logits in float32 or better."""
        logits = output.to(_at_least_float32(output.dtype))
        if self.soft_cap is not None:
            logits = (logits / self.soft_cap).tanh() * self.soft_cap
        return logits if self.temperature == 1.0 else logits / self.temperature

    def cap_slope(self, logits: Tensor) -> Tensor | None:
        """Derivative of the soft cap, which is 1 - tanh^2, from the logits; None without one."""
        return None if self.soft_cap is None else 1.0 - (logits * (self.temperature / self.soft_cap)).square_()


def _project_at_once(head: nn.Linear, hidden_SE: Tensor, target_S: Tensor, shaping: _Shaping) -> tuple[Tensor, Tensor]:
    """The definition. Few logits are better kept: computing them again takes a third more time (a CPU, V = 98)."""
    log_p_SV = shaping(head(hidden_SE)).log_softmax(dim=-1)
    return log_p_SV.gather(1, target_S[:, None])[:, 0], -(log_p_SV.exp() * log_p_SV).sum(dim=-1)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Output of the layer for token ids ``start`` to ``start + C``."""

    columns: slice
    weight_CE: Tensor
    """In the compute type."""
    logits_SC: Tensor
    """Whoever gets it may overwrite it."""
    is_target_S: Tensor
    """bool: the position's target is one of these columns."""
    column_S1: Tensor
    """int64 column of the target, any where it is in another chunk."""


def _chunks(
    hidden_SE: Tensor, weight_VE: Tensor, bias_V: Tensor | None, target_S: Tensor, shaping: _Shaping, chunk_logits: int
) -> Iterator[_Chunk]:
    step = max(1, chunk_logits // len(target_S))
    for columns in (slice(start, start + step) for start in range(0, len(weight_VE), step)):
        weight_CE = weight_VE[columns].to(hidden_SE.dtype)
        bias_C = None if bias_V is None else bias_V[columns].to(hidden_SE.dtype)
        logits_SC = shaping(nn.functional.linear(hidden_SE, weight_CE, bias_C))
        column_S = target_S - columns.start
        is_target_S = (column_S >= 0) & (column_S < len(weight_CE))
        yield _Chunk(columns, weight_CE, logits_SC, is_target_S, column_S.clamp(0, len(weight_CE) - 1)[:, None])


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True, slots=True)
class _SoftmaxSums:
    """What is known of each position's softmax after some columns; all [S]."""

    peak_S: Tensor
    """m: the largest logit."""
    mass_S: Tensor
    """Sum of exp(logit - m)."""
    moment_S: Tensor
    """Sum of (logit - m) exp(logit - m)."""

    @classmethod
    def of(cls, logits_SC: Tensor) -> Self:
        """Of these columns; overwrites them."""
        peak_S = logits_SC.amax(dim=1)
        exponent_SC = logits_SC.sub_(peak_S[:, None])
        weight_SC = exponent_SC.exp()
        mass_S = weight_SC.sum(dim=1)
        return cls(peak_S, mass_S, weight_SC.mul_(exponent_SC).sum(dim=1))

    def __add__(self, other: Self) -> Self:
        peak_S = torch.maximum(self.peak_S, other.peak_S)
        (mass_S, moment_S), (other_mass_S, other_moment_S) = self._relative_to(peak_S), other._relative_to(peak_S)
        return type(self)(peak_S, mass_S + other_mass_S, moment_S + other_moment_S)

    def _relative_to(self, peak_S: Tensor) -> tuple[Tensor, Tensor]:
        shift_S = self.peak_S - peak_S
        scale_S = shift_S.exp()
        return scale_S * self.mass_S, scale_S * (self.moment_S + shift_S * self.mass_S)


class _Projection(torch.autograd.Function):
    """(hidden, weight, bias, target, shaping, chunk_logits) -> (logprobs, entropy)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_SE: Tensor,
        weight_VE: Tensor,
        bias_V: Tensor | None,
        target_S: Tensor,
        shaping: _Shaping,
        chunk_logits: int,
    ) -> tuple[Tensor, Tensor]:
        sums: _SoftmaxSums | None = None
        target_logit_S = hidden_SE.new_zeros(len(hidden_SE), dtype=_at_least_float32(hidden_SE.dtype))
        for chunk in _chunks(hidden_SE, weight_VE, bias_V, target_S, shaping, chunk_logits):
            found_S = chunk.logits_SC.gather(1, chunk.column_S1)[:, 0]
            target_logit_S = torch.where(chunk.is_target_S, found_S, target_logit_S)
            more = _SoftmaxSums.of(chunk.logits_SC)
            sums = more if sums is None else sums + more
        assert sums is not None  # a vocabulary has a token
        log_mass_S = sums.mass_S.log()
        logprobs_S = target_logit_S - sums.peak_S - log_mass_S
        entropy_S = log_mass_S - sums.moment_S / sums.mass_S
        ctx.save_for_backward(hidden_SE, weight_VE, bias_V, target_S, sums.peak_S + log_mass_S, entropy_S)
        ctx.shaping, ctx.chunk_logits = shaping, chunk_logits
        ctx.set_materialize_grads(False)  # None tells that the loss has no entropy term
        return logprobs_S, entropy_S

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs_S: Tensor | None, grad_entropy_S: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        hidden_SE, weight_VE, bias_V, target_S, log_sum_S, entropy_S = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        upstream = _Upstream(
            torch.zeros_like(log_sum_S) if grad_logprobs_S is None else grad_logprobs_S / ctx.shaping.temperature,
            None if grad_entropy_S is None else grad_entropy_S / ctx.shaping.temperature,
            log_sum_S,
            entropy_S,
        )
        grad_hidden_SE = torch.zeros_like(hidden_SE, dtype=log_sum_S.dtype) if wants_hidden else None
        grad_weight_VE = torch.empty_like(weight_VE) if wants_weight else None
        grad_bias_V = torch.empty_like(bias_V) if wants_bias else None
        with torch.autocast(hidden_SE.device.type, enabled=False):
            for chunk in _chunks(hidden_SE, weight_VE, bias_V, target_S, ctx.shaping, ctx.chunk_logits):
                cap_slope_SC = ctx.shaping.cap_slope(chunk.logits_SC)
                grad_SC = upstream.grad_of_logits(chunk)
                if cap_slope_SC is not None:
                    grad_SC.mul_(cap_slope_SC)
                if grad_bias_V is not None:
                    grad_bias_V[chunk.columns] = grad_SC.sum(dim=0)
                grad_SC = grad_SC.to(hidden_SE.dtype)
                if grad_weight_VE is not None:
                    grad_weight_VE[chunk.columns] = grad_SC.T @ hidden_SE
                if grad_hidden_SE is not None:
                    grad_hidden_SE += grad_SC @ chunk.weight_CE
        return (
            None if grad_hidden_SE is None else grad_hidden_SE.to(hidden_SE.dtype),
            grad_weight_VE,
            grad_bias_V,
            None,
            None,
            None,
        )


@dataclass(frozen=True, slots=True)
class _Upstream:
    """What turns recomputed logits into their gradient; all [S], the incoming ones divided by the temperature."""

    grad_logprobs_S: Tensor
    grad_entropy_S: Tensor | None
    log_sum_S: Tensor
    """Log-sum-exp of all V logits."""
    entropy_S: Tensor

    def grad_of_logits(self, chunk: _Chunk) -> Tensor:
        """[S, C]: d log p_t / d l_j = [j = t] - p_j and d H / d l_j = -p_j (log p_j + H); overwrites the logits."""
        log_p_SC = chunk.logits_SC.sub_(self.log_sum_S[:, None])
        if self.grad_entropy_S is None:
            grad_SC = log_p_SC.exp_().mul_(-self.grad_logprobs_S[:, None])
        else:
            p_SC = log_p_SC.exp()
            log_p_SC.add_(self.entropy_S[:, None]).mul_(-self.grad_entropy_S[:, None])
            grad_SC = log_p_SC.sub_(self.grad_logprobs_S[:, None]).mul_(p_SC)
        at_target_S = torch.where(chunk.is_target_S, self.grad_logprobs_S, 0.0)
        return grad_SC.scatter_add_(1, chunk.column_S1, at_target_S[:, None])
