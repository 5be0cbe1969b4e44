"""LoRA adapters (arXiv:2106.09685) through peft: only they are trained, beside a frozen model."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lambdapo_async.config.learner import LoraConfig
from lambdapo_async.errors import CheckpointError, ConfigError
from lambdapo_async.weights.adapter import PREFIX, adapter_settings, target_linears
from learner.model_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, FINGERPRINT, ModelSource

ADAPTER = "default"
"""peft's name of the one adapter."""
_BASE = ".base_layer"


def add_adapters(model: PreTrainedModel, lora: LoraConfig) -> None:
    """Freeze the model's weights and put fresh float32 adapters beside them, in place; B = 0 changes no output.

    Raises:
        ConfigError: peft is not installed, or a target names no linear layer.
    """
    targets = sorted(target_linears(model, lora, head=model.get_output_embeddings()))
    try:
        import peft  # takes seconds and is needed by few
    except ImportError as error:
        raise ConfigError(f"learner.lora needs peft: pip install 'lambdapo-async[lora]' ({error})") from error
    settings = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets)
    # In a bare module: peft takes names of a transformers model's dense layers for those of its stacked experts, too.
    peft.inject_adapter_in_model(settings, nn.ModuleList([model]), adapter_name=ADAPTER)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_adapter(name))
        if _is_adapter(name):
            parameter.data = parameter.data.float()


def adapter_tensors(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The adapters among a model's parameters, under the names of peft's files."""
    for name, tensor in named:
        if _is_adapter(name):
            yield PREFIX + name.replace(f".{ADAPTER}.", "."), tensor


def save_adapter(folder: Path, tensors: Mapping[str, Tensor], lora: LoraConfig, *, base: ModelSource) -> None:
    """Write adapters of the model ``base`` as peft, transformers and vLLM read them.

    Args:
        tensors: from :func:`adapter_tensors`.
    """
    (folder / ADAPTER_CONFIG).write_bytes(adapter_settings(tensors, lora, base=str(base.folder.resolve())))
    save_file(dict(tensors), folder / ADAPTER_WEIGHTS, metadata={"format": "pt", FINGERPRINT: base.fingerprint})


def load_adapter(model: PreTrainedModel, folder: Path, lora: LoraConfig) -> None:
    """Fill a model's adapters, made by :func:`add_adapters` of ``lora``, from a folder of :func:`save_adapter`.

    Raises:
        CheckpointError: they are of another shape, other layers, or another scale.
    """
    saved = load_file(folder / ADAPTER_WEIGHTS)
    own = dict(adapter_tensors((name, parameter.data) for name, parameter in model.named_parameters()))
    odd = sorted(name for name in saved.keys() | own.keys() if _shape(saved, name) != _shape(own, name))
    if odd:
        raise CheckpointError(
            f"{folder}: {len(odd)} adapters differ from learner.lora, first {odd[0]}: "
            f"{_shape(saved, odd[0])} saved, {_shape(own, odd[0])} configured"
        )
    if _scaling(folder) != lora.alpha / lora.rank:
        raise CheckpointError(
            f"{folder}: its adapters were trained with learner.lora.alpha = {_scaling(folder) * lora.rank:g}, and are "
            f"another policy with {lora.alpha:g}: set it back"
        )
    for name, tensor in own.items():
        tensor.copy_(saved[name])


def frozen(named: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The weights beside the adapters, under the names of the model without them."""
    for name, tensor in named.items():
        if not _is_adapter(name):
            yield name.replace(f"{_BASE}.", "."), tensor


def merged(named: Mapping[str, Tensor], *, scaling: float) -> Iterator[tuple[str, Tensor]]:
    """The weights that the adapters amount to, under the names of the model without adapters.

    Args:
        named: parameters of a model with adapters, or without: these come out as they are.
        scaling: alpha / rank.
    """
    for name, tensor in named.items():
        if _is_adapter(name):
            continue
        layer, base, kind = name.rpartition(f"{_BASE}.")
        if not base:
            yield name, tensor
        elif kind == "weight":
            down, up = (named[f"{layer}.lora_{part}.{ADAPTER}.weight"] for part in "AB")
            yield f"{layer}.weight", add_product(tensor, down, up, scaling=scaling)
        else:
            yield f"{layer}.{kind}", tensor


def merge_folder(model: PreTrainedModel, folder: Path) -> None:
    """Add the adapters in ``folder`` to the weights of a model without adapters, in place.

    Raises:
        CheckpointError: they are of another model.
    """
    scaling, weights = _scaling(folder), dict(model.named_parameters())
    saved = load_file(folder / ADAPTER_WEIGHTS)
    for name, down in saved.items():
        if not name.endswith(".lora_A.weight"):
            continue
        layer = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        up = saved[name.replace(".lora_A.", ".lora_B.")]
        expected = (up.shape[0], down.shape[1])
        if _shape(weights, f"{layer}.weight") != expected:
            raise CheckpointError(
                f"{folder} adapts {layer}.weight of shape {expected}, which is {_shape(weights, f'{layer}.weight')} in "
                f"{model.name_or_path}: put the model back that it was trained on"
            )
        weight = weights[f"{layer}.weight"].data
        weight.copy_(add_product(weight, down, up, scaling=scaling))


@torch.no_grad()
def add_product(weight: Tensor, down: Tensor, up: Tensor, *, scaling: float) -> Tensor:
    """W + scaling * B A, float32, with ``down`` = A [rank, in] and ``up`` = B [out, rank]."""
    return weight.float() + scaling * (up.float() @ down.float())


def _is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None


def _scaling(folder: Path) -> float:
    """What the products of saved adapters are multiplied with."""
    settings = json.loads((folder / ADAPTER_CONFIG).read_bytes())
    scaling: float = settings["lora_alpha"] / settings["r"]
    return scaling
