"""What training will need of the device's memory, told before the weights are loaded."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lambdapo_async.config.learner import LearnerConfig
from lambdapo_async.errors import ConfigError
from lambdapo_async.weights.adapter import target_linears
from learner.projection import CHUNK_LOGITS, KEPT_LOGITS
from learner.saved_tensors import SavedBytes, saved_bytes

logger = logging.getLogger(__name__)

GIB = 2**30
FLOAT32, BFLOAT16 = 4, 2
LOGIT_BUFFERS = 3
"""Logits, probabilities and gradient of one chunk."""
_MEMINFO = Path("/proc/meminfo")

DeviceKind = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes by purpose, at the fullest moment: the start of the first backward pass after an update."""

    weights: int
    """As the model holds them: trained ones that are their own masters in float32, others in the compute type."""
    masters: int
    """In float32 beside the weights; 0 where the weights are their own."""
    gradients: int
    """Of all micro-batches, in float32; where weights are bfloat16, the largest one's of one micro-batch too."""
    optimizer: int
    """AdamW's two moments, with ``optimizer_offload`` the gradients' copy too."""
    activations: int
    """What autograd keeps of ``micro_batch_tokens`` tokens; layers left out where only running the model could tell."""
    layer: int
    """One layer's in the backward pass: gradients of its activations, and these again where they are recomputed."""
    logits: int
    """One chunk of the output layer, and what is kept of all of them."""
    gathered: int = 0
    """With several ranks: weights, gradients and their float32 sums, of the parts that are whole at a time."""
    loading: int = 0
    """Host memory while the model is read: a whole copy on every rank, which leaves before training; 0 where it stays
    as ``weights``."""
    optimizer_on_host: bool
    activations_on_host: bool

    @property
    def host(self) -> int:
        """Bytes that an offload moves to the host's memory."""
        return (self.masters + self.optimizer) * self.optimizer_on_host + self.activations * self.activations_on_host

    @property
    def device(self) -> int:
        """Bytes that stay on the device."""
        return self._total - self.host

    @property
    def _total(self) -> int:
        states = self.weights + self.masters + self.gradients + self.optimizer
        return states + self.activations + self.layer + self.logits + self.gathered

    def describe(self) -> str:
        """One line for the log."""
        parts = {
            "weights": self.weights,
            "masters": self.masters,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "layer": self.layer,
            "logits": self.logits,
            "gathered": self.gathered,
        }
        listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
        moved = f", {self.host / GIB:.2f} of it in the host's memory" if self.host else ""
        read = f"; {self.loading / GIB:.2f} GiB of host memory while it is read" if self.loading else ""
        return f"{listed}: {self._total / GIB:.2f} GiB{moved}{read}"


def read_shape(folder: Path, attention: str | None = None) -> PreTrainedModel:
    """The model of a folder without memory for its weights.

    Raises:
        OSError, ValueError, KeyError: there is none, or it does not run with ``attention``, an ``attn_implementation``.
    """
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model


def plan_memory(
    model: PreTrainedModel,
    learner: LearnerConfig,
    device: DeviceKind,
    *,
    world_size: int = 1,
    context_size: int = 1,
) -> MemoryPlan:
    """Add up what training a model needs.

    Args:
        model: on any device, without adapters.
        device: on ``cuda`` matrices are computed in bfloat16.
        world_size: ranks that share weights, gradients and optimizer; the plan is one rank's.
        context_size: those of them that share the tokens of a micro-batch.
    """
    compute = BFLOAT16 if device == "cuda" else FLOAT32
    num_weights = num_trained = _count(model)
    # As ``learner.model_loading.trained_dtype`` has it; ranks gather slices of float32 in bfloat16 instead.
    has_bfloat16 = device == "cuda" and world_size == 1 and learner.lora is None
    weights = num_weights * (BFLOAT16 if has_bfloat16 else FLOAT32)
    if learner.lora is not None:
        targets = target_linears(model, learner.lora, head=model.get_output_embeddings()).values()
        num_trained = sum(learner.lora.rank * (layer.in_features + layer.out_features) for layer in targets)
        weights = num_weights * compute + num_trained * FLOAT32
    largest = max(parameter.numel() for parameter in model.parameters())
    num_tokens = -(-learner.micro_batch_tokens // context_size)
    text = model.config.get_text_config()
    saved = _saved_bytes(model, num_tokens, device, is_checkpointed=learner.activation_checkpointing)
    num_logits = num_tokens * text.vocab_size
    num_kept = 0 if learner.activation_checkpointing else min(num_logits, KEPT_LOGITS[device])
    return MemoryPlan(
        weights=weights // world_size,
        masters=num_trained * FLOAT32 // world_size if has_bfloat16 or learner.optimizer_offload else 0,
        gradients=num_trained * FLOAT32 // world_size + (largest * BFLOAT16 if has_bfloat16 else 0),
        optimizer=num_trained * FLOAT32 * (3 if learner.optimizer_offload else 2) // world_size,
        # What the output layer takes comes on top.
        activations=saved.kept + num_tokens * text.hidden_size * compute,
        layer=saved.layer * (1 + learner.activation_checkpointing),
        logits=min(num_logits, CHUNK_LOGITS[device]) * FLOAT32 * LOGIT_BUFFERS + num_kept * compute,
        # Weights, gradients, and the float32 buffer in which FSDP adds these up.
        gathered=_gathered_elements(model) * (2 * compute + FLOAT32) if world_size > 1 else 0,
        loading=0 if device == "cpu" and world_size == 1 else num_weights * (compute if learner.lora else FLOAT32),
        optimizer_on_host=learner.optimizer_offload,
        activations_on_host=learner.activation_offload,
    )


def check_fits(plan: MemoryPlan, device: DeviceKind, *, device_free: int | None, host_free: int | None) -> None:
    """Compare a rank's plan with the memory that is free; None is not known and not compared.

    Args:
        host_free: this rank's part, where several share a host.

    Raises:
        ConfigError: it does not fit.
    """
    if host_free is not None and plan.loading > host_free:
        raise ConfigError(
            f"reading the model takes {plan.loading / GIB:.2f} GiB of host memory on every rank, and "
            f"{host_free / GIB:.2f} GiB are free for each: start fewer ranks on this machine, or free memory"
        )
    if device == "cpu":
        _check(plan.device + plan.host, host_free, "memory", plan)
        return
    _check(plan.device, device_free, "GPU memory", plan)
    _check(plan.host, host_free, "host memory", plan)


def free_memory(device: DeviceKind) -> int | None:
    """Bytes that can still be taken; None where the system does not say."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    if not _MEMINFO.exists():
        return None
    fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def _check(needed: int, free: int | None, kind: str, plan: MemoryPlan) -> None:
    if free is None or needed <= free:
        return
    raise ConfigError(
        f"training needs {needed / GIB:.2f} GiB of {kind}, of which {free / GIB:.2f} GiB are free "
        f"({plan.describe()}): lower learner.micro_batch_tokens, or set learner.activation_checkpointing, "
        "learner.optimizer_offload or learner.lora"
    )


def _count(model: nn.Module) -> int:
    """Parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _gathered_elements(model: PreTrainedModel) -> int:
    """Parameters whole at a time under FSDP: what lies outside the layers, one layer, and the next one on its way."""
    layers = [child for child in model.modules() if type(child).__name__ in (model._no_split_modules or ())]
    sizes = [_count(layer) for layer in layers]
    return _count(model) - sum(sizes) + 2 * max(sizes, default=0)


def _saved_bytes(model: PreTrainedModel, num_tokens: int, device: DeviceKind, *, is_checkpointed: bool) -> SavedBytes:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    try:
        return saved_bytes(model.config, num_tokens, dtype=dtype, is_checkpointed=is_checkpointed)
    except (RuntimeError, TypeError, ValueError) as error:  # whatever others' code says to tensors without numbers
        logger.warning("the memory plan leaves out the activations of a %s: %s", type(model).__name__, error)
        return SavedBytes(0, 0)
