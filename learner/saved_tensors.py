"""What autograd saves of a forward pass, found by running one on tensors that have shapes and no memory.

B = 1, H query heads, T tokens, D size of a head.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import saved_tensors_hooks
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from learner.activations import recompute_layers

_ATTENTION = "lambdapo_saved_tensors"


@dataclass(frozen=True, slots=True)
class SavedBytes:
    """Of one document, parameters and output layer left out."""

    kept: int
    """From the forward to the backward pass."""
    layer: int
    """A layer's activations, of all layers the mean."""


def saved_bytes(config: PreTrainedConfig, num_tokens: int, *, dtype: torch.dtype, is_checkpointed: bool) -> SavedBytes:
    """Sizes without a number being computed. Copies that autocast makes are not among them.

    Args:
        config: of a causal language model.
        dtype: of its parameters. Without bfloat16 experts cannot be followed: a mixture in float32 counts as twice one
            in bfloat16, which is a bit too much.
        is_checkpointed: every layer is recomputed in the backward pass.

    Raises:
        ConfigError: layers that cannot be recomputed.
        RuntimeError, TypeError, ValueError: a model that looks at numbers, or does not run like this.
    """
    model = _shaped(config, dtype)
    if dtype == torch.float32 and any(parameter.ndim == 3 for parameter in model.parameters()):
        half = saved_bytes(config, num_tokens, dtype=torch.bfloat16, is_checkpointed=is_checkpointed)
        return SavedBytes(2 * half.kept, 2 * half.layer)
    kept = _saved_by(model, num_tokens)
    layer = kept // model.config.get_text_config().num_hidden_layers
    if is_checkpointed:
        recompute_layers(model)
        kept = _saved_by(model, num_tokens)
    return SavedBytes(kept, layer)


def _shaped(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    AttentionInterface.register(_ATTENTION, _attention_layer)
    described = copy.deepcopy(config)  # building a model writes into it
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            described, attn_implementation=_ATTENTION, dtype=dtype
        )
    for module in model.modules():
        # Those that stretch ask for the largest position; sizes are the same.
        match getattr(module, "rope_type", None):
            case str():
                module.rope_type = "default"
            case dict() as types:
                module.rope_type = dict.fromkeys(types, "default")
    return model.eval()


def _saved_by(model: PreTrainedModel, num_tokens: int) -> int:
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage  # held, or its address would become another's
        return tensor

    positions_BT = torch.zeros(1, num_tokens, dtype=torch.long, device="meta")
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model.get_decoder()(input_ids=positions_BT, position_ids=positions_BT, use_cache=False)
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    return sum(storage.nbytes() for address, storage in saved.items() if address not in parameters)


class _Attention(torch.autograd.Function):
    """query [B, H, T, D], key and value -> [B, H, T, D]; saves what FlashAttention saves."""

    @staticmethod
    def forward(ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:3], value.shape[3])
        log_sum = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, log_sum)
        return output


def _attention_layer(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: object
) -> tuple[Tensor, None]:
    """[B, T, H, D], a copy of what is saved: SDPA makes one, and kernels that join parts."""
    return _Attention.apply(query, key, value).transpose(1, 2).contiguous(), None  # type: ignore[no-untyped-call]
