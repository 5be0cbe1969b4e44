"""What vLLM is told of a run's model and its actor before its engine starts."""

import math
import secrets
from pathlib import Path

import transformers
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.model_executor.models import ModelRegistry
from vllm.platforms import current_platform

from actors.adapters import lora_options
from actors.engine import CUT_OFF_S
from lambdapo_async.config import RunConfig

_CPU_KV_CACHE_GIB = 0.25
_CPU_BLOCK_SIZE = 32


def engine_args(model_dir: Path, config: RunConfig) -> AsyncEngineArgs:
    """For the model in ``model_dir``, started with dummy weights; uses what :meth:`VllmEngine.start` says."""
    actor = config.actor
    on_cpu = current_platform.is_cpu()
    cache_gib = _CPU_KV_CACHE_GIB if actor.kv_cache_gib is None and on_cpu else actor.kv_cache_gib
    return AsyncEngineArgs(
        model=str(model_dir),
        load_format="dummy",
        dtype=actor.dtype,
        quantization=actor.quantization,
        max_model_len=config.model.max_length,
        max_num_seqs=actor.max_num_seqs,
        tensor_parallel_size=actor.tensor_parallel_size,
        gpu_memory_utilization=actor.gpu_memory_utilization,
        kv_cache_memory_bytes=None if cache_gib is None else int(cache_gib * 2**30),
        block_size=_CPU_BLOCK_SIZE if on_cpu else None,  # vLLM's default there, 128, shares no short prefix
        enforce_eager=on_cpu,  # compiling costs 42 s and gains 7 % there
        logprobs_mode="processed_logprobs",
        seed=secrets.randbits(31),  # actors with one seed would draw the same noise
        worker_extension_cls="actors.vllm_worker.WeightSwap",
        enable_log_requests=False,
        # A SIGTERM to every process must not cut off what we still drain.
        shutdown_timeout=math.ceil(actor.drain_s + CUT_OFF_S),
        **lora_options(config),
    )


def import_model_class(model_dir: Path) -> None:
    """Spare vLLM the subprocess (15 s at the first start) in which it looks at a model class so as not to wake CUDA."""
    for architecture in transformers.AutoConfig.from_pretrained(model_dir).architectures or ():
        if architecture in ModelRegistry.models:
            ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())
