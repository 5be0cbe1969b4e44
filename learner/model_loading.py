"""From a folder to a model that is ready to be trained: planned, read, checked, prepared."""

import logging
from contextlib import AbstractContextManager, nullcontext

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from lambdapo_async.config.learner import LearnerConfig
from lambdapo_async.errors import ConfigError
from learner.activations import enable_checkpointing
from learner.attention import select_attention
from learner.context_parallel import check_heads
from learner.lora import add_adapters, load_adapter, merge_folder
from learner.memory_plan import DeviceKind, check_fits, free_memory, plan_memory, read_shape
from learner.model_folder import ModelSource
from learner.packing_check import check_packing
from learner.parallel import ALONE, Ranks

logger = logging.getLogger(__name__)


def trained_dtype(config: LearnerConfig, device: torch.device, ranks: Ranks = ALONE) -> torch.dtype:
    """What the model holds its trained parameters in: bfloat16, beside float32 masters, where one GPU trains them all.

    Adapters are float32 on every device, and so are slices, which ranks gather in bfloat16.
    """
    is_whole = ranks.is_alone and config.lora is None
    return torch.bfloat16 if device.type == "cuda" and is_whole else torch.float32


def parameter_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Name of each parameter -> :func:`weight_dtype`."""
    return {name: weight_dtype(model, name, dtype) for name, _ in model.named_parameters()}


def weight_dtype(model: PreTrainedModel, name: str, dtype: torch.dtype) -> torch.dtype:
    """``dtype``, or float32 for a parameter or buffer with which the architecture computes in nothing less."""
    exact = model._keep_in_fp32_modules_strict or ()
    return torch.float32 if any(part in name for part in exact) else dtype


def autocast(device: torch.device, *, is_on: bool = True) -> AbstractContextManager[object]:
    """bfloat16 for float32 matrices on a GPU; a CPU computes in the type of its weights."""
    if device.type != "cuda" or not is_on:
        return nullcontext()
    return torch.autocast("cuda", torch.bfloat16)


def load_model(
    source: ModelSource, config: LearnerConfig, device: torch.device, ranks: Ranks = ALONE
) -> PreTrainedModel:
    """Read, check and prepare a model; its memory plan is logged first.

    With several ranks it stays on the CPU: ``learner.sharding.shard`` moves this rank's slices to the device.

    Raises:
        ConfigError: it cannot be read, does not fit into memory, or cannot be trained as configured.
    """
    if source.adapter is not None and config.lora is None:
        raise ConfigError(f"{source.adapter} holds LoRA adapters: set learner.lora to go on with them")
    _check_ranks(config, ranks)
    described = _described(source, device)
    check_heads(described, ranks.context_size)
    _check_memory(described, config, device, ranks)
    # Frozen weights are read as they are computed with: a master is for what small updates must not get lost in.
    frozen_on_gpu = config.lora is not None and device.type == "cuda"
    home = _home(device, ranks)
    model = _read(source, torch.bfloat16 if frozen_on_gpu else torch.float32, home)
    with autocast(home):
        _prepare(model, source, config)
    return _bound_for(device, ranks, model)


def load_frozen_model(source: ModelSource, device: torch.device, ranks: Ranks = ALONE) -> PreTrainedModel:
    """A checked model for forward passes alone, in the type it is computed with; adapters are merged into it.

    Raises:
        ConfigError: it cannot be read, or cannot be run on packed sequences.
    """
    model = _read(source, torch.bfloat16 if device.type == "cuda" else torch.float32, _home(device, ranks))
    if source.adapter is not None:
        merge_folder(model, source.adapter)
    model.requires_grad_(False)
    return _bound_for(device, ranks, model)


def _home(device: torch.device, ranks: Ranks) -> torch.device:
    """Where the whole model is read and checked: a device that is shared may have no room for it."""
    return device if ranks.is_alone else torch.device("cpu")


def _bound_for(device: torch.device, ranks: Ranks, model: PreTrainedModel) -> PreTrainedModel:
    """The model with the attention of the device, and of the part of each sequence, that it will run on."""
    if model.device.type != device.type or ranks.context is not None:
        model.set_attn_implementation(select_attention(device, ranks.context))
    return model


def _check_ranks(config: LearnerConfig, ranks: Ranks) -> None:
    if ranks.is_alone:
        return
    chosen = {
        "optimizer_offload": config.optimizer_offload,
        "activation_offload": config.activation_offload,
        "compile": config.compile,
    }
    if refused := [f"learner.{name}" for name, is_on in chosen.items() if is_on]:
        raise ConfigError(
            f"{' and '.join(refused)} with {ranks.world_size} ranks is not supported: set it to false, for ranks "
            "already share optimizer and weights, or train on one"
        )


def _check_memory(described: PreTrainedModel, config: LearnerConfig, device: torch.device, ranks: Ranks) -> None:
    kind: DeviceKind = "cuda" if device.type == "cuda" else "cpu"
    plan = plan_memory(described, config, kind, world_size=ranks.world_size, context_size=ranks.context_size)
    logger.info("memory plan: %s", plan.describe())
    host_free = free_memory("cpu")
    ranks.wait_for_all()  # what one rank reads, another would not find free
    share = None if host_free is None else host_free // ranks.ranks_here
    check_fits(plan, kind, device_free=free_memory(kind), host_free=share)


def _described(source: ModelSource, device: torch.device) -> PreTrainedModel:
    try:
        return read_shape(source.folder, select_attention(device))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {source.folder} cannot be loaded: {error!s:.300}") from error
    except KeyError as error:  # Falcon looks its layers up by the name
        raise ConfigError(
            f"model {source.folder} has no layers for the attention {error}: choose another model"
        ) from error


def _read(source: ModelSource, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model in evaluation mode, its weights complete and its attention proved."""
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source.folder,
            dtype=dtype,
            attn_implementation=select_attention(device),
            ignore_mismatched_sizes=True,  # refused below, with names
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"model {source.folder} cannot be loaded: {error!s:.300}") from error
    problems = [
        f"{name} is {list(saved)} in the file and {list(expected)} in config.json"
        for name, saved, expected in sorted(report["mismatched_keys"])
    ] + [f"{name} is missing" for name in sorted(report["missing_keys"])]
    if problems:
        raise ConfigError(
            f"the weights of {source.folder} are not those of its config.json, {len(problems)} differ: "
            f"{'; '.join(problems[:3])}"
        )
    checked: PreTrainedModel = model.to(device).eval()
    with autocast(device):
        check_packing(checked)
    return checked


def _prepare(model: PreTrainedModel, source: ModelSource, config: LearnerConfig) -> None:
    """Everything that changes how a whole, checked model is trained; what shards it comes after."""
    if config.lora is not None:
        add_adapters(model, config.lora)
        if source.adapter is not None:
            load_adapter(model, source.adapter, config.lora)
    if config.activation_checkpointing:
        enable_checkpointing(model)
    if config.compile:
        compile_layers(model)


def compile_layers(model: PreTrainedModel) -> None:
    """Compile each decoder layer in place; one graph serves all layers, and no parameter is renamed.

    Lengths are symbolic from the start, for no two micro-batches have the same.

    Raises:
        ConfigError: the model does not say what its layers are.
    """
    names = model._no_split_modules or ()
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ConfigError(f"{type(model).__name__} names no layers that could be compiled: set learner.compile = false")
    for layer in layers:
        layer.compile(dynamic=True)
