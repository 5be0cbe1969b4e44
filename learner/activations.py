"""What autograd keeps between the forward and the backward pass, and how to keep less of it on the device."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lambdapo_async.errors import ConfigError
from lambdapo_async.packed_layout import Segment, packed_layout

PROBE_TOKENS = 16
TOLERANCE = 0.02
"""Largest difference of hidden states, in units of their standard deviation: rounding is below, dropout far above."""


def recompute_layers(model: PreTrainedModel) -> None:
    """Recompute each layer in the backward pass instead of keeping its activations.

    transformers recomputes only layers in training mode. The mode of the layers alone is changed: what lies inside
    them, dropout included, stays in evaluation mode.

    Raises:
        ConfigError: the model cannot be checkpointed.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not model.supports_gradient_checkpointing or not layers:
        raise ConfigError(
            f"{type(model).__name__} has no layers that can be recomputed: set learner.activation_checkpointing = false"
        )
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    for layer in layers:
        layer.training = True


def enable_checkpointing(model: PreTrainedModel) -> None:
    """:func:`recompute_layers`, with proof that the outputs are the same.

    Raises:
        ConfigError: the model cannot be checkpointed, or a layer computes something else in training mode.
    """
    expected = _probe(model)
    recompute_layers(model)
    difference = float((_probe(model) - expected).abs().max() / expected.std())
    if not difference < TOLERANCE:
        raise ConfigError(
            f"{type(model).__name__} computes something else in training mode (dropout?): hidden states differ by "
            f"{difference:.3g} of their standard deviation; set learner.activation_checkpointing = false"
        )


@torch.no_grad()
def _probe(model: PreTrainedModel) -> Tensor:
    """[1, PROBE_TOKENS, E] last hidden states of one document."""
    positions_T = torch.arange(PROBE_TOKENS, device=model.device)
    output = model.get_decoder()(
        input_ids=positions_T[None] % model.get_input_embeddings().num_embeddings,
        position_ids=positions_T[None],
        use_cache=False,
        layout=packed_layout([Segment(PROBE_TOKENS)]).to(model.device),
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


def offload_to_host(model: nn.Module, *, is_on: bool) -> AbstractContextManager[object]:
    """Around a forward pass with checkpointing: what autograd keeps lies in the host's memory, parameters excepted."""
    if not is_on:
        return nullcontext()
    kept = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        if tensor.untyped_storage().data_ptr() in kept:
            return tensor.device, tensor
        host = torch.empty(tensor.size(), dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return tensor.device, host.copy_(tensor)

    def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = packed
        return tensor.to(device)

    return saved_tensors_hooks(pack, unpack)
