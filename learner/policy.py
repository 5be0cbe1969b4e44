"""The policy being trained: a model, its optimizer, and the views that others need of it."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from lambdapo_async.config.learner import LearnerConfig
from lambdapo_async.errors import ConfigError
from lambdapo_async.packing import MicroBatch
from learner.activations import offload_to_host
from learner.flops import ModelFlops
from learner.logprobs import LogprobModel
from learner.lora import adapter_tensors, frozen, merged, save_adapter
from learner.model_folder import CONFIG_FILE, ModelSource, companion_files
from learner.model_loading import autocast, load_model, parameter_dtypes, trained_dtype, weight_dtype
from learner.optimizer import MasterOptimizer
from learner.packing_check import packable_positions
from learner.parallel import ALONE, Ranks
from learner.router_loss import RouterLoss
from learner.sharding import full_tensors, shard, whole_tensor
from learner.weight_files import write_weights

LossFn = Callable[[Tensor, Tensor], Tensor]
"""``logprobs_T`` and ``entropy_T``, both [T] float32 with gradient -> scalar loss, divided by the denominator of the
whole step."""


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
    """A causal language model with AdamW on float32 masters; on CUDA it computes in bfloat16.

    With ``learner.lora`` adapters alone are trained; they are then published beside the frozen model, and checkpoints
    hold the adapters and the path of the model that they belong to.

    With several ranks each holds a slice of every parameter. What runs the model, updates it, or walks through its
    parameters is then called on all ranks together, with as many micro-batches on each; ranks that share sequences
    (``Ranks.context``) pass the same micro-batches and get the same results.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        source: ModelSource,
        config: LearnerConfig,
        temperature: float,
        dtype: torch.dtype,
        ranks: Ranks = ALONE,
    ) -> None:
        self._model, self._ranks = model, ranks
        self._source, self._config = source, config
        self._flops = ModelFlops.of(model)
        self._forward = LogprobModel(
            model,
            temperature=temperature,
            context=ranks.context,
            keeps_logits=not config.activation_checkpointing,
        )
        shard(self._forward, model, ranks)
        # Tied weights appear once, under the name that comes first in the model.
        self._parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self._optimizer = MasterOptimizer(self._parameters, config, parameter_dtypes(model, dtype))
        self._casts = dtype == torch.float32
        self._router_loss = RouterLoss(model, ranks) if config.router_aux_coef else None
        self.model_files: Mapping[str, bytes] = companion_files(source.folder)
        """File name -> content of config, generation config and tokenizer."""
        self._frozen_bf16: dict[str, Tensor] | None = None
        self.num_updates = 0
        """Optimizer updates taken."""
        self.num_skipped = 0
        """Updates left out because the gradient was not finite."""
        self.num_flops = 0.0
        """Floating-point operations of all :meth:`backward` calls of this rank (learner.flops)."""

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        revision: str | None,
        config: LearnerConfig,
        temperature: float,
        device: torch.device,
        ranks: Ranks = ALONE,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Load a folder or repo id in Hugging Face's format; the masters of what is trained become float32.

        Args:
            path: local folder or repo id, a LoRA adapter's too; ``Checkpoint.model_dir`` to resume.
            temperature: ``sampling.temperature``: what the logits are divided by.
            dtype: of the trained parameters in the model; None is what ``trained_dtype`` says.

        Raises:
            ConfigError: no such model, one that does not fit into memory, or one that cannot be trained on packed
                sequences.
        """
        source = ModelSource.locate(str(path), revision)
        model = load_model(source, config, device, ranks)
        dtype = dtype or trained_dtype(config, device, ranks)
        return cls(model, source=source, config=config, temperature=temperature, dtype=dtype, ranks=ranks)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
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
        """Longest sequence that can be trained on."""
        return packable_positions(self._model.config)

    @property
    def lr(self) -> float:
        """Learning rate of the next update: linear warm-up from lr / warmup_steps, then ``learner.lr_schedule``."""
        config = self._config
        if self.num_updates < config.warmup_steps:
            return config.lr * (self.num_updates + 1) / config.warmup_steps
        done = (self.num_updates - config.warmup_steps) / max(1, config.num_updates - config.warmup_steps)
        match config.lr_schedule:
            case "constant":
                return config.lr
            case "linear":
                return config.lr * max(0.0, 1.0 - done)
            case "cosine":
                return config.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))

    @torch.no_grad()
    def logprobs(self, micro_batch: MicroBatch, *, temperature: float | None = None) -> Tensor:
        """[T] float32 log pi of each token, 0 where there is no loss; without gradient.

        Args:
            temperature: what the logits are divided by; None is the run's.
        """
        with autocast(self.device, is_on=self._casts):
            logprobs_T: Tensor = self._forward(micro_batch, temperature)[0]
        return logprobs_T

    def expert_costs(self, micro_batches: Sequence[MicroBatch]) -> Tensor | None:
        """What :meth:`backward` balances routers with, by one forward pass over a rank's share of an update.

        None without ``router_aux_coef``.
        """
        return None if self._router_loss is None else self._router_loss.costs(micro_batches, self.logprobs)

    def backward(self, micro_batch: MicroBatch, loss_fn: LossFn, costs_RX: Tensor | None = None) -> TokenStatistics:
        """Add the gradient of ``loss_fn``, and of the routers' balance, on one micro-batch on the policy's device."""
        offload = offload_to_host(self._model, is_on=self._config.activation_offload)
        with autocast(self.device, is_on=self._casts), offload:
            logprobs_T, entropy_T = self._forward(micro_batch)
        loss = loss_fn(logprobs_T, entropy_T)
        if self._router_loss is not None and costs_RX is not None:
            loss = loss + self._config.router_aux_coef * self._router_loss.loss(micro_batch, costs_RX)
        torch.autograd.backward(loss)
        self.num_flops += self._flops.training(micro_batch) / self._ranks.context_size
        return TokenStatistics(logprobs_T.detach(), entropy_T.detach())

    def step(self) -> float:
        """Clip the accumulated gradient, update the masters, forget the gradient.

        Nothing is trained on a gradient with NaN or infinity: the update is skipped and counted.

        Returns:
            Global gradient norm before clipping.
        """
        grad_norm = float(whole_tensor(self._optimizer.clip(self._config.max_grad_norm)))
        if math.isfinite(grad_norm):
            self._optimizer.step(lr=self.lr)
            self.num_updates += 1
        else:
            self.num_skipped += 1
        self._optimizer.zero_grad()
        return grad_norm

    def named_masters(self) -> Iterator[tuple[str, Tensor]]:
        """Name and float32 master, or this rank's slice, of what is trained, named as in :meth:`optimizer_state`.

        Not copies.
        """
        for name, master in self._optimizer.masters.items():
            yield name, master.detach()

    def named_weights(self, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, Tensor]]:
        """Name in a Hugging Face checkpoint and whole CPU tensor of every weight, one by one and tied ones once.

        Adapters are merged and stacked experts cut apart. Float32 tensors may be the policy's own; others are copies.
        Every rank must run it to its end, and ranks but the first get nothing.
        """
        lora = self._config.lora
        own = merged(self._named_states(), scaling=lora.alpha / lora.rank if lora else 0.0)
        yield from self._whole(own, dtype)

    def _whole(self, named: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Gathered from all ranks, under a checkpoint's names; ranks but the first get nothing."""
        # Cast before they are gathered: half as much goes over the wire.
        kinds = ((name, tensor, weight_dtype(self._model, name, dtype)) for name, tensor in named)
        cast = ((name, tensor.to(kind, copy=dtype != torch.float32)) for name, tensor, kind in kinds)
        for name, weight in full_tensors(cast, self._ranks):
            yield from revert_weight_conversion(self._model, {name: weight}).items()

    def named_bf16(self) -> Iterator[tuple[str, Tensor]]:
        """:meth:`named_weights` as contiguous copies: bfloat16, but for what is computed with in float32 always."""
        for name, weight in self.named_weights(torch.bfloat16):
            yield name, weight.contiguous()

    def published(self) -> Iterator[tuple[str, Tensor]]:
        """What actors get: :meth:`named_bf16`, or with LoRA the frozen weights and the adapters.

        Frozen weights are the same tensors every time, so that nobody compares them anew; the rest are copies.
        """
        if self._config.lora is None:
            yield from self.named_bf16()
            return
        if self._frozen_bf16 is None:
            whole = self._whole(frozen(self._named_states()), torch.bfloat16)
            self._frozen_bf16 = {name: weight.contiguous() for name, weight in whole}
        yield from self._frozen_bf16.items()
        for name, tensor in self.named_adapter():
            yield name, tensor.bfloat16()

    def named_adapter(self) -> Iterator[tuple[str, Tensor]]:
        """Name in peft's files and contiguous float32 copy on the CPU of every adapter; nothing without LoRA."""
        for name, tensor in full_tensors(adapter_tensors(self._model.named_parameters()), self._ranks):
            yield name, tensor.clone(memory_format=torch.contiguous_format)

    def save_model(self, folder: Path) -> None:
        """Write a folder that ``AutoModelForCausalLM.from_pretrained`` and :meth:`load` read; rank 0 writes.

        It holds float32 weights; with LoRA the adapters alone and where the model lies that they belong to.
        """
        folder.mkdir(parents=True, exist_ok=True)
        files = dict(self.model_files)
        if self._config.lora is None:
            write_weights(folder, self.named_weights(torch.float32))
        else:
            adapter = dict(self.named_adapter())
            # Beside config.json transformers would look for the model's weights here.
            del files[CONFIG_FILE]
            if adapter:
                save_adapter(folder, adapter, self._config.lora, base=self._source)
        if self._ranks.is_main:
            for name, content in files.items():
                (folder / name).write_bytes(content)

    def _named_states(self) -> dict[str, Tensor]:
        """Masters and frozen parameters, tied ones once, and the buffers that belong to a checkpoint."""
        own = {name for name, _ in (*self._model.named_parameters(), *self._model.named_buffers())}
        states = {name: tensor for name, tensor in self._model.state_dict().items() if name in own}
        return {**states, **dict(self.named_masters())}

    def optimizer_state(self) -> dict[str, Tensor]:
        """``moment:parameter`` -> tensor of everything AdamW remembers; empty before the first update."""
        return self._optimizer.state()

    def load_optimizer_state(self, moments: Mapping[str, Tensor], *, num_updates: int, num_skipped: int) -> None:
        """Go on from :meth:`optimizer_state` of a policy with the same parameters.

        Raises:
            CheckpointError: the moments are of another model.
        """
        self._optimizer.load_state(moments)
        self.num_updates, self.num_skipped = num_updates, num_skipped
