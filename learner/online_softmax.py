"""log pi and entropy of a softmax whose logits are seen a chunk of columns at a time (arXiv:1805.02867).

S positions, V vocabulary, C columns: a run of consecutive token ids. Logits are float32 or better.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

LOWEST = -1e30
"""Below every logit, and finite: differences from it are no NaN."""


@dataclass(frozen=True, slots=True)
class Shaping:
    """What the layer's output goes through before the softmax."""

    temperature: float
    soft_cap: float | None

    def __call__(self, output: Tensor, *, overwrites: bool = False) -> Tensor:
        """Logits in float32 or better; maybe ``output`` itself, which is as it was or ``overwrites`` is set."""
        logits = output.to(at_least_float32(output.dtype))
        if self.soft_cap is not None:
            logits = (logits / self.soft_cap).tanh() * self.soft_cap
        if self.temperature == 1.0:
            return logits
        return logits.div_(self.temperature) if overwrites or logits is not output else logits / self.temperature

    def cap_slope(self, logits: Tensor) -> Tensor | None:
        """Derivative of the soft cap, which is 1 - tanh^2, from the logits; None without one."""
        return None if self.soft_cap is None else 1.0 - (logits * (self.temperature / self.soft_cap)).square_()


@dataclass(frozen=True, slots=True)
class Chunk:
    """What the layer says of C token ids."""

    output_SC: Tensor
    """In the compute type."""
    column_S: Tensor
    """int64 column of the target, outside of 0 to C where it is in another chunk."""


@dataclass(slots=True)
class SoftmaxState:
    """What is known of each position after some columns; all [S]."""

    peak_S: Tensor
    """m: the largest logit."""
    mass_S: Tensor
    """Sum of exp(logit - m)."""
    moment_S: Tensor
    """Sum of (logit - m) exp(logit - m)."""
    target_logit_S: Tensor
    """0 until it was seen."""

    @classmethod
    def before(cls, hidden_SE: Tensor) -> Self:
        """The first column."""
        zeros_S = hidden_SE.new_zeros(len(hidden_SE), dtype=at_least_float32(hidden_SE.dtype))
        return cls(torch.full_like(zeros_S, LOWEST), zeros_S, zeros_S.clone(), zeros_S.clone())

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability of the target, entropy, and log-sum-exp of all logits, each [S]."""
        log_mass_S = self.mass_S.log()
        logprobs_S = self.target_logit_S - self.peak_S - log_mass_S
        return logprobs_S, log_mass_S - self.moment_S / self.mass_S, self.peak_S + log_mass_S


@dataclass(frozen=True, slots=True)
class Upstream:
    """What turns logits into their gradient; all [S], the incoming ones divided by the temperature."""

    grad_logprobs_S: Tensor
    grad_entropy_S: Tensor | None
    """None for a loss without an entropy term."""
    log_sum_S: Tensor
    """Log-sum-exp of all V logits."""
    entropy_S: Tensor


@dataclass(frozen=True, slots=True)
class Passes:
    """What is done with each chunk, for one kind of device."""

    fold: Callable[[SoftmaxState, Chunk, Shaping], None]
    """Take a chunk into the state, and leave it as it is."""
    grad: Callable[[Upstream, Chunk, Shaping], Tensor]
    """[S, C] gradient of the layer's output, in its type; may overwrite the chunk."""


def fold_chunk(state: SoftmaxState, chunk: Chunk, shaping: Shaping) -> None:
    """Take a chunk into ``state``, any type and device."""
    logits_SC = shaping(chunk.output_SC)
    is_target_S, column_S1 = _target_in(chunk)
    found_S = logits_SC.gather(1, column_S1)[:, 0]
    state.target_logit_S = torch.where(is_target_S, found_S, state.target_logit_S)
    peak_S = torch.maximum(state.peak_S, logits_SC.amax(dim=1))
    scratch_SC = None if logits_SC is chunk.output_SC else logits_SC
    exponent_SC = torch.sub(logits_SC, peak_S[:, None], out=scratch_SC)
    weight_SC = exponent_SC.exp()
    shift_S = state.peak_S - peak_S
    scale_S = shift_S.exp()
    more_mass_S, more_moment_S = weight_SC.sum(dim=1), weight_SC.mul_(exponent_SC).sum(dim=1)
    state.moment_S = scale_S * (state.moment_S + shift_S * state.mass_S) + more_moment_S
    state.mass_S = scale_S * state.mass_S + more_mass_S
    state.peak_S = peak_S


def grad_of_output(upstream: Upstream, chunk: Chunk, shaping: Shaping) -> Tensor:
    """[S, C]: d log p_t / d l_j = [j = t] - p_j and d H / d l_j = -p_j (log p_j + H); any type and device."""
    logits_SC = shaping(chunk.output_SC, overwrites=True)
    cap_slope_SC = shaping.cap_slope(logits_SC)
    log_p_SC = logits_SC.sub_(upstream.log_sum_S[:, None])
    if upstream.grad_entropy_S is None:
        grad_SC = log_p_SC.exp_().mul_(-upstream.grad_logprobs_S[:, None])
    else:
        p_SC = log_p_SC.exp()
        log_p_SC.add_(upstream.entropy_S[:, None]).mul_(-upstream.grad_entropy_S[:, None])
        grad_SC = log_p_SC.sub_(upstream.grad_logprobs_S[:, None]).mul_(p_SC)
    is_target_S, column_S1 = _target_in(chunk)
    grad_SC.scatter_add_(1, column_S1, torch.where(is_target_S, upstream.grad_logprobs_S, 0.0)[:, None])
    if cap_slope_SC is not None:
        grad_SC.mul_(cap_slope_SC)
    return grad_SC.to(chunk.output_SC.dtype)


def _target_in(chunk: Chunk) -> tuple[Tensor, Tensor]:
    """[S] bool and [S, 1] int64: whether the target is in the chunk, and its column, any where it is not."""
    last = chunk.output_SC.shape[1] - 1
    is_target_S = (chunk.column_S >= 0) & (chunk.column_S <= last)
    return is_target_S, chunk.column_S.clamp(0, last)[:, None]


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The type that a softmax is computed in."""
    return torch.promote_types(dtype, torch.float32)
