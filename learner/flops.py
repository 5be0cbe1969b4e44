"""Floating-point operations of training, and the share of the device's peak that they reach (MFU).

Counted are the multiplications and additions that the model needs (PaLM, arXiv:2204.02311, appendix B): a matrix of N
elements costs 2 N per token forward, 2 N for the gradient of its input and 2 N for its own, if it is trained; causal
attention costs half of the full square. What activation checkpointing computes twice counts once.
"""

import re
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from lambdapo_async.packing import MicroBatch

PEAK_BF16 = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Words of the device's name -> dense bfloat16 FLOP/s of the vendor's data sheet; the longest match counts."""

CHOSEN_EXPERTS = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
"""What configs call the experts of a token: most, Aria and HunYuan (one number a layer, perhaps), Ernie, Gemma 4."""


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """What a model multiplies with; an expert counts by its share of the tokens."""

    body: float
    """Matrix elements applied to every token."""
    trained_body: float
    """Those of them that are trained."""
    head: int
    """Elements of the output layer, which sees the loss tokens alone."""
    trained_head: int
    attention: int
    """Layers x query heads x head size."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """Count a model with its adapters, on any device."""
        text = model.config.get_text_config()
        matrices = {name: parameter for name, parameter in _body(model).items() if parameter.ndim >= 2}
        active = {name: parameter.numel() * expert_share(model, name) for name, parameter in matrices.items()}
        head = model.get_output_embeddings().weight
        heads = text.num_attention_heads
        head_dim = text.to_dict().get("head_dim") or text.hidden_size // heads
        return cls(
            body=sum(active.values()),
            trained_body=sum(active[name] for name, parameter in matrices.items() if parameter.requires_grad),
            head=head.numel(),
            trained_head=head.numel() if head.requires_grad else 0,
            attention=text.num_hidden_layers * heads * head_dim,
        )

    def training(self, micro_batch: MicroBatch) -> float:
        """Of one forward and backward pass."""
        num_tokens = micro_batch.layout.num_tokens
        return (
            (4.0 * self.body + 2.0 * self.trained_body) * num_tokens
            + (4.0 * self.head + 2.0 * self.trained_head) * micro_batch.num_loss_tokens
            + 12.0 * self.attention * micro_batch.layout.squares / 2
        )


def expert_share(model: PreTrainedModel, name: str) -> float:
    """Share of the tokens that a parameter of the model sees: experts are stacked as [experts, out, in].

    All of them where the config does not say how many experts a token has.
    """
    if ".experts." not in name:
        return 1.0
    settings = model.config.get_text_config().to_dict()
    chosen = [np.mean(settings[key]) for key in CHOSEN_EXPERTS if settings.get(key)]
    return float(chosen[0]) / model.get_parameter(name).shape[0] if chosen else 1.0


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device, None when it is not in the table."""
    found = [words for words in PEAK_BF16 if re.search(rf"\b{words}\b", device_name)]
    return PEAK_BF16[max(found, key=len)] if found else None


def utilisation(flops: float, seconds: float, device: torch.device) -> float | None:
    """MFU: share of the device's peak; None on a CPU or a device without an entry."""
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if peak is None else flops / seconds / peak


def _body(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Every parameter but embeddings and output layer."""
    outside = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in outside}
