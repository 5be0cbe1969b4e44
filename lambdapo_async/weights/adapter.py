"""LoRA adapters (arXiv:2106.09685) among a version's tensors: beside the frozen model, named as in peft's files."""

import json
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lambdapo_async.config.learner import LoraConfig
from lambdapo_async.errors import ConfigError, WeightsError
from lambdapo_async.weights.state import State
from lambdapo_async.weights.tensor_file import BitTensor

PREFIX = "base_model.model."
"""What peft's files put before a parameter's name."""
_DOWN, _UP, _WEIGHT = ".lora_A.weight", ".lora_B.weight", ".weight"
_TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def is_adapter(name: str) -> bool:
    """Whether a tensor of a version is part of an adapter; the others are the model's."""
    return name.startswith(PREFIX)


def target_linears(model: nn.Module, lora: LoraConfig, *, head: nn.Module | None) -> dict[str, nn.Linear]:
    """Name -> layer of the linear layers that get an adapter; ``head``, the output layer, takes none.

    Raises:
        ConfigError: a target names no linear layer of the model.
    """
    # Nothing derived of it: a router of that kind returns more than a product.
    linears = {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear and layer is not head}
    found = {_last(name) for name in linears}
    if unknown := set(lora.target_modules) - found:
        raise ConfigError(
            f"learner.lora.target_modules names {', '.join(sorted(unknown))}, but the linear layers of "
            f"{type(model).__name__} are {', '.join(sorted(found))} (the output layer takes no adapter)"
        )
    targets = set(lora.target_modules) or found
    return {name: layer for name, layer in linears.items() if _last(name) in targets}


def adapter_shapes(linears: Mapping[str, nn.Linear], lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the adapters of ``linears``: A [rank, in] and B [out, rank] of each."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in linears.items():
        shapes[f"{PREFIX}{name}{_DOWN}"] = (lora.rank, layer.in_features)
        shapes[f"{PREFIX}{name}{_UP}"] = (layer.out_features, lora.rank)
    return shapes


def adapter_settings(names: Iterable[str], lora: LoraConfig, *, base: str) -> bytes:
    """The ``adapter_config.json`` that peft, transformers and vLLM read.

    Args:
        names: of the adapters' tensors.
        base: the model they belong to, a folder or repo id.
    """
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted({name.rsplit(".", 3)[-3] for name in names}),
    }
    return (json.dumps(settings, indent=2) + "\n").encode()


def merged_state(state: State, lora: LoraConfig) -> State:
    """The model that ``state``'s adapters make of its own, rounded once to the type of each weight.

    Raises:
        WeightsError: an adapter without its other half or without its layer.
    """
    tensors = {name: tensor for name, tensor in state.tensors.items() if not is_adapter(name)}
    for name, down in state.tensors.items():
        if not name.endswith(_DOWN):
            continue
        weight = name.removeprefix(PREFIX).removesuffix(_DOWN) + _WEIGHT
        up = state.tensors.get(name.removesuffix(_DOWN) + _UP)
        if up is None or weight not in tensors:
            raise WeightsError(f"{name!r:.200} adapts {weight!r:.200}, of which a part is missing")
        tensors[weight] = _plus_product(tensors[weight], down, up, scaling=lora.alpha / lora.rank)
    return State(state.version, tensors)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _plus_product(weight: BitTensor, down: BitTensor, up: BitTensor, *, scaling: float) -> BitTensor:
    """W + scaling * B A, computed in float32."""
    exact = _values(weight) + scaling * (_values(up) @ _values(down))
    rounded = exact.to(_TORCH[weight.dtype]).contiguous().flatten()
    bits = rounded.view(torch.int16 if weight.bits.itemsize == 2 else torch.int32).numpy().view(weight.bits.dtype)
    return BitTensor(weight.dtype, weight.shape, bits)


def _values(tensor: BitTensor) -> Tensor:
    signed = torch.from_numpy(tensor.bits.copy().view(f"<i{tensor.bits.itemsize}"))
    return signed.view(_TORCH[tensor.dtype]).float().reshape(tensor.shape)
