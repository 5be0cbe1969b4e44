"""What we add to vLLM's worker, in the engine's process: swapping weights, and dying with the actor.

vLLM imports this module by name (``worker_extension_cls``); nothing else may, because it acts on its process.
"""

import logging
import multiprocessing
from collections.abc import Sequence, Set

import torch
from safetensors import safe_open
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import layerwise
from vllm.platforms import current_platform
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from actors.weights_file import in_layers_of
from lambdapo_async.parent_death import end_only_with_parent

# Where vLLM spawns its processes (GPU), and at import: loading a model takes minutes, in which a kill -9 of the actor
# would orphan this process, its memory and its GPU for good. Forked ones (CPU) are tied to the actor from the start.
_PARENT = multiprocessing.parent_process()
if _PARENT is not None and _PARENT.pid is not None:
    end_only_with_parent(_PARENT.pid)


class WeightSwap:
    """Mixed into vLLM's worker class; its methods are called through ``collective_rpc``."""

    vllm_config: VllmConfig
    model_config: ModelConfig
    model_runner: GPUModelRunner

    def swap_weights(self, path: str, names: Sequence[str]) -> list[str]:
        """Load tensors of the safetensors file at ``path``, which the caller has validated, into the running model.

        Args:
            path: the file; its pages are read where they lie, and nothing refers to them afterwards.
            names: every tensor of each layer that is to change.

        Returns:
            Parameters of these layers, in vLLM's naming, that the file left untouched and nothing was derived for.
        """
        model = self.model_runner.get_model()
        # It warns at every swap about layers that get no weights; we compare the names ourselves.
        logging.getLogger(layerwise.__name__).setLevel(logging.ERROR)
        with set_current_vllm_config(self.vllm_config), torch.inference_mode(), safe_open(path, framework="pt") as file:
            layerwise.initialize_layerwise_reload(model)
            loaded = model.load_weights((name, file.get_tensor(name)) for name in names)
            layerwise.finalize_layerwise_reload(model, self.model_config)
            if current_platform.is_cpu():
                _repack_tied_embeddings(model, loaded)
        parameters = sorted(_without_wrapper(name) for name, _ in model.named_parameters())
        return [name for name in in_layers_of(loaded, parameters) if name not in loaded and not _is_derived(name)]


def _without_wrapper(name: str) -> str:
    """A parameter's name without the module that vLLM puts around a layer that may take adapters."""
    return name.replace(".base_layer.", ".")


def _is_derived(name: str) -> bool:
    """Scales that vLLM computes while it quantises a weight that the file brought."""
    return name.endswith(("weight_scale", "input_scale"))


def _repack_tied_embeddings(model: torch.nn.Module, loaded: Set[str]) -> None:
    """Renew the packed copies of embedding weights that came into the model by another name.

    On a CPU ``lm_head`` multiplies with a packed copy of its weight. Reloading renews it when ``lm_head.weight`` is
    in the file; with tied embeddings it is not, and the model would go on with the old output layer, silently.
    """
    for name, module in model.named_modules():
        if isinstance(module, VocabParallelEmbedding) and _without_wrapper(f"{name}.weight") not in loaded:
            module.quant_method.process_weights_after_loading(module)
