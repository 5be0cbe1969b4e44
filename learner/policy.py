"""The policy being trained: float32 master weights, its optimizer, and the views others need of it."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lambdapo_async.config.learner import LearnerConfig
from lambdapo_async.errors import CheckpointError, ConfigError
from lambdapo_async.packing import MicroBatch
from learner.attention import select_attention
from learner.logprobs import packed_logprobs
from learner.model_folder import companion_files, locate_model
from learner.packing_check import check_packing

LossFn = Callable[[Tensor], Tensor]
"""``logprobs_T`` [T] float32 with gradient -> scalar loss, divided by the denominator of the whole step."""

OPTIMIZER_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""What AdamW keeps per parameter."""


@dataclass(frozen=True, slots=True)
class TokenStatistics:
    """What a forward pass says of each packed token; all without gradient, 0 where there is no loss."""

    logprobs_T: Tensor
    """[T] float32 log pi."""
    entropy_T: Tensor
    """[T] float32 entropy of the distribution the token was drawn from, in nats."""


def pick_device(choice: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """``auto`` is the GPU when there is one; ``ConfigError`` when one is asked for and missing."""
    if choice == "cuda" and not torch.cuda.is_available():
        raise ConfigError('learner.device = "cuda", but torch sees no CUDA device: use "auto" or "cpu"')
    if choice == "auto":
        choice = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(choice)


class Policy:
    """A causal language model with AdamW on float32 masters; bfloat16 autocast on CUDA."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        config: LearnerConfig,
        temperature: float,
        model_files: Mapping[str, bytes],
    ) -> None:
        self._model = model.eval()  # no dropout: log pi must be the distribution that is published
        self._config = config
        self._temperature = temperature
        # Tied weights appear once, under the name that comes first in the model.
        self._parameters = dict(model.named_parameters())
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        self.model_files = model_files
        """File name -> content of config, generation config and tokenizer."""
        self.num_updates = 0
        """Optimizer updates taken."""
        self.num_skipped = 0
        """Updates left out because the gradient was not finite."""

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        revision: str | None,
        config: LearnerConfig,
        temperature: float,
        device: torch.device,
    ) -> Self:
        """Load a folder or repo id in Hugging Face's format; its weights become float32.

        Args:
            path: local folder or repo id; ``Checkpoint.model_dir`` to resume.
            temperature: ``sampling.temperature``: what the logits are divided by.

        Raises:
            ConfigError: no such model, or one that cannot be trained on packed sequences.
        """
        folder = locate_model(str(path), revision)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation=select_attention(device)
            ).to(device)
        except (OSError, ValueError, SafetensorError) as error:
            raise ConfigError(f"model {folder} cannot be loaded: {error!s:.300}") from error
        with _autocast(device):
            check_packing(model.eval())
        return cls(model, config=config, temperature=temperature, model_files=companion_files(folder))

    @property
    def device(self) -> torch.device:
        """Where the masters live."""
        device: torch.device = self._model.device
        return device

    @property
    def num_parameters(self) -> int:
        """Trained parameters, tied ones counted once."""
        return sum(parameter.numel() for parameter in self._parameters.values())

    @property
    def vocab_size(self) -> int:
        """Token ids that the model knows."""
        vocab_size: int = self._model.get_input_embeddings().num_embeddings
        return vocab_size

    @property
    def max_positions(self) -> int:
        """Longest sequence that the model was made for."""
        max_positions: int = self._model.config.max_position_embeddings
        return max_positions

    @property
    def lr(self) -> float:
        """Learning rate of the next update: linear warm-up from lr / warmup_steps, then constant."""
        warmup = self._config.warmup_steps
        return self._config.lr * min(1.0, (self.num_updates + 1) / warmup) if warmup else self._config.lr

    @torch.no_grad()
    def logprobs(self, micro_batch: MicroBatch) -> Tensor:
        """[T] float32 log pi of each token, 0 where there is no loss; without gradient."""
        with _autocast(self.device):
            logprobs_T, _ = packed_logprobs(self._model, micro_batch, temperature=self._temperature)
        return logprobs_T

    def backward(self, micro_batch: MicroBatch, loss_fn: LossFn) -> TokenStatistics:
        """Add the gradient of ``loss_fn`` on one micro-batch, which lies on the policy's device."""
        with _autocast(self.device):
            logprobs_T, entropy_T = packed_logprobs(self._model, micro_batch, temperature=self._temperature)
        torch.autograd.backward(loss_fn(logprobs_T))
        return TokenStatistics(logprobs_T.detach(), entropy_T)

    def step(self) -> float:
        """Clip the accumulated gradient, update the masters, forget the gradient.

        Nothing is trained on a gradient with NaN or infinity: the update is skipped and counted.

        Returns:
            Global gradient norm before clipping.
        """
        grad_norm = float(torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._config.max_grad_norm))
        if math.isfinite(grad_norm):
            for group in self._optimizer.param_groups:
                group["lr"] = self.lr
            self._optimizer.step()
            self.num_updates += 1
        else:
            self.num_skipped += 1
        self._optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def named_masters(self) -> Iterator[tuple[str, Tensor]]:
        """Hugging Face name and float32 master of every parameter, tied ones once; not a copy."""
        for name, parameter in self._parameters.items():
            yield name, parameter.detach()

    def named_bf16(self) -> Iterator[tuple[str, Tensor]]:
        """Hugging Face name and a contiguous bfloat16 copy on the CPU of every parameter, tied ones once."""
        for name, master in self.named_masters():
            yield name, master.to(torch.bfloat16).cpu().contiguous()

    def save_model(self, folder: Path) -> None:
        """Write a folder that ``AutoModelForCausalLM.from_pretrained`` and :meth:`load` read: float32 weights."""
        self._model.save_pretrained(folder)
        for name, content in self.model_files.items():
            (folder / name).write_bytes(content)

    def optimizer_state(self) -> dict[str, Tensor]:
        """``moment:parameter`` -> tensor of everything AdamW remembers; empty before the first update."""
        return {
            f"{moment}:{name}": self._optimizer.state[parameter][moment]
            for name, parameter in self._parameters.items()
            if parameter in self._optimizer.state
            for moment in OPTIMIZER_MOMENTS
        }

    def load_optimizer_state(self, moments: Mapping[str, Tensor], *, num_updates: int, num_skipped: int) -> None:
        """Go on from :meth:`optimizer_state` of a policy with the same parameters.

        Raises:
            CheckpointError: the moments are of another model.
        """
        names = list(self._parameters)
        expected = {f"{moment}:{name}" for name in names for moment in OPTIMIZER_MOMENTS} if moments else set()
        if expected != set(moments):
            odd = sorted(expected ^ set(moments))
            raise CheckpointError(f"optimizer state is of another model: {len(odd)} names differ, first {odd[0]!r}")
        state = {
            index: {moment: moments[f"{moment}:{name}"] for moment in OPTIMIZER_MOMENTS}
            for index, name in enumerate(names)
            if moments
        }
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": state})
        self.num_updates, self.num_skipped = num_updates, num_skipped


def _autocast(device: torch.device) -> AbstractContextManager[object]:
    if device.type != "cuda":
        return nullcontext()
    return torch.autocast("cuda", torch.bfloat16)
