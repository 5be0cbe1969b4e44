"""The training loop that one would write by hand: losses of micro-batches, backward, clip, AdamW."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.peers.interface import Setting
from benchmarks.workload import Workload

RATIO_CAP = 2.0
"""Of our ``cispo`` preset."""

Losses = Callable[[PreTrainedModel, Workload, Setting], Iterator[Tensor]]
"""(model, workload, setting) -> the loss of each micro-batch, divided by the step's loss tokens."""


class PlainLoop:
    """Float32 masters, fused AdamW and, on CUDA, bfloat16 autocast; ours holds bfloat16 weights."""

    def __init__(self, setting: Setting, *, attention: str, losses: Losses, slots: Callable[[Workload], int]) -> None:
        self._setting, self._losses, self._slots = setting, losses, slots
        self._model = AutoModelForCausalLM.from_pretrained(
            setting.model_dir, dtype=torch.float32, attn_implementation=attention
        ).to(setting.device)
        self._model.eval()
        self._parameters = list(self._model.parameters())
        learner = setting.config.learner
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=learner.lr, betas=learner.betas, weight_decay=learner.weight_decay, fused=True
        )

    def step(self, workload: Workload) -> float:
        """One optimizer step."""
        for loss in self._losses(self._model, workload, self._setting):
            torch.autograd.backward(loss)
        max_norm = self._setting.config.learner.max_grad_norm
        grad_norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, max_norm))
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def num_slots(self, workload: Workload) -> int:
        """Positions that the layers compute."""
        return self._slots(workload)


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 on CUDA, nothing on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log pi of each target from all logits in float32: [..., V] and [...] -> [...]."""
    return logits.float().log_softmax(dim=-1).gather(-1, targets[..., None])[..., 0]


def cispo(logprobs: Tensor, behavior: Tensor, advantages: Tensor, mask: Tensor, *, num_loss_tokens: int) -> Tensor:
    """Truncated importance weight times log pi (arXiv:2506.13585); all of one shape."""
    ratio = (logprobs.detach() - behavior).exp().clamp(max=RATIO_CAP)
    return -(ratio * advantages * logprobs).masked_fill(~mask, 0.0).sum() / num_loss_tokens
