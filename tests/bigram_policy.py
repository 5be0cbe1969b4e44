"""A policy small enough to know everything about: one logit per pair of tokens, plain gradient descent, float64."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lambdapo_async.packing import MicroBatch
from learner.policy import TokenStatistics


class BigramPolicy:
    """What ``Trainer`` uses of ``learner.policy.Policy``; log pi(token) depends on the token before it alone."""

    def __init__(self, *, vocab: int, lr: float, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logits_VV = torch.randn(vocab, vocab, dtype=torch.float64, generator=generator).requires_grad_()
        self.lr, self.device = lr, torch.device("cpu")
        self.num_updates = self.num_skipped = self.num_forwards = 0
        self.gradients: list[Tensor] = []
        """[V, V] of every update taken."""
        self.num_batches: list[int] = [0]
        """Per update, micro-batches."""

    def table(self) -> Tensor:
        """[V, V] log pi of the column's token after the row's."""
        return self.logits_VV.log_softmax(dim=1)

    def completion_logprobs(self, prompt: np.ndarray, completion: np.ndarray) -> np.ndarray:
        """[C] float32 log pi of one completion."""
        ids = torch.tensor(np.concatenate([prompt, completion]), dtype=torch.int64)
        return self.table().detach()[ids[:-1], ids[1:]][len(prompt) - 1 :].float().numpy()

    def logprobs(self, micro_batch: MicroBatch) -> Tensor:
        self.num_forwards += 1
        return self._forward(micro_batch)[0].detach()

    def expert_costs(self, micro_batches: Sequence[MicroBatch]) -> None:
        """It has no experts."""

    def backward(
        self, micro_batch: MicroBatch, loss_fn: Callable[[Tensor, Tensor], Tensor], costs_RX: None
    ) -> TokenStatistics:
        self.num_batches[-1] += 1
        logprobs_T, entropy_T = self._forward(micro_batch)
        loss_fn(logprobs_T, entropy_T).backward()
        return TokenStatistics(logprobs_T.detach(), entropy_T.detach())

    def step(self) -> float:
        gradient = self.logits_VV.grad
        assert gradient is not None
        self.gradients.append(gradient.clone())
        with torch.no_grad():
            self.logits_VV -= self.lr * gradient
        self.logits_VV.grad = None
        self.num_updates += 1
        self.num_batches.append(0)
        return float(self.gradients[-1].norm())

    def _forward(self, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """A rollout's first token follows itself: its value is wrong, and masked."""
        ids_T, table = micro_batch.input_ids_T, self.table()
        previous_T = ids_T[micro_batch.predictor_T]
        entropy_V = -(table.exp() * table).sum(dim=1)
        return table[previous_T, ids_T], entropy_V[previous_T]
