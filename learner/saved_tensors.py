"""What autograd saves of a forward pass, found by running one on tensors that have shapes and no memory.

B = 1, H query heads, T tokens, D size of a head.
"""

import copy

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import saved_tensors_hooks
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig

from learner.activations import recompute_layers

_ATTENTION = "lambdapo_saved_tensors"


def saved_bytes(config: PreTrainedConfig, num_tokens: int, *, dtype: torch.dtype, is_checkpointed: bool) -> int:
    """Bytes that stay until the backward pass of one document, parameters and output layer left out.

    Args:
        config: of a causal language model.
        dtype: of its parameters. Without bfloat16 experts cannot be followed: a mixture in float32 counts as twice one
            in bfloat16, which is a bit too much.
        is_checkpointed: every layer is recomputed in the backward pass.

    Raises:
        ConfigError: layers that cannot be recomputed.
        NotImplementedError, RuntimeError: a model that looks at numbers.
    """
    AttentionInterface.register(_ATTENTION, _attention_layer)
    described = copy.deepcopy(config)  # building a model writes into it
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(described, attn_implementation=_ATTENTION, dtype=dtype).eval()
    if dtype == torch.float32 and any(parameter.ndim == 3 for parameter in model.parameters()):
        return 2 * saved_bytes(config, num_tokens, dtype=torch.bfloat16, is_checkpointed=is_checkpointed)
    if is_checkpointed:
        recompute_layers(model)
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
    _module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, **_: object
) -> tuple[Tensor, None]:
    """[B, T, H, D], which the layer copies for what follows: SDPA does, and kernels that join parts."""
    return _Attention.apply(query, key, value).transpose(1, 2), None  # type: ignore[no-untyped-call]
