"""What a run's learner publishes of a model, known from its ``config.json`` alone."""

from pathlib import Path

import torch
import transformers

from lambdapo_async.config.learner import LoraConfig
from lambdapo_async.weights.adapter import adapter_shapes, target_linears


def published_shapes(model_dir: Path, lora: LoraConfig | None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model that transformers builds, tied parameters once, and of its adapters."""
    with torch.device("meta"):  # takes no memory
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(model_dir))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if lora is not None:
        shapes |= adapter_shapes(target_linears(model, lora, head=model.get_output_embeddings()), lora)
    return shapes
