"""A tiny random Qwen3 with a character tokenizer, and the files of its weight versions."""

# ruff: noqa: E402
from actors.environment import prepare_environment

prepare_environment()  # a test process that starts an engine must set this before torch is imported

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, set_seed

from lambdapo_async.config import RunConfig

ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz +-*/=().,:;?!\n"
EOS = "<eos>"
MAX_LENGTH = 128
NUM_LAYERS = 2


def build_model_folder(folder: Path, *, tied: bool = True) -> Path:
    """``config.json`` and tokenizer files, no weights: what an actor gets from its run."""
    folder.mkdir(parents=True)
    vocabulary = {character: index for index, character in enumerate([EOS, *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=EOS))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS).save_pretrained(folder)
    config = _model_config(len(vocabulary), tied=tied)
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"architectures": ["Qwen3ForCausalLM"]}))
    return folder


def _model_config(vocab_size: int, *, tied: bool) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=tied,
        eos_token_id=0,
        pad_token_id=0,
    )


def tiny_model(folder: Path, version: int) -> PreTrainedModel:
    """The model of ``folder`` with the weights of ``version``: float32 values that bfloat16 holds exactly."""
    set_seed(version)
    config = Qwen3Config.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Larger than the usual initialisation: every part matters, and versions differ by whole nats.
            noise = torch.randn_like(parameter) * (0.3 if "norm" in name else 0.12)
            parameter.copy_((parameter + noise).to(torch.bfloat16).float())
    return model.eval()


def published_weights(folder: Path, version: int) -> dict[str, Tensor]:
    """What a learner publishes as ``version``: bfloat16, tied parameters once."""
    return {
        name: parameter.detach().to(torch.bfloat16).contiguous()
        for name, parameter in tiny_model(folder, version).named_parameters()
    }


def write_weights(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path)
    return path


@torch.no_grad()
def reference_logprobs(
    model: PreTrainedModel, prompt_ids: Sequence[int], completion_ids: Sequence[int], *, temperature: float
) -> NDArray[np.float32]:
    """[C] log-probabilities by transformers in float32."""
    ids = torch.tensor([[*prompt_ids, *completion_ids]])
    logits = model(ids).logits[0, len(prompt_ids) - 1 : -1].float()
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    chosen: NDArray[np.float32] = logprobs.gather(1, ids[0, len(prompt_ids) :, None])[:, 0].numpy()
    return chosen


def tiny_config(folder: Path, *, dtype: str = "float32") -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": str(folder), "max_length": MAX_LENGTH},
            "task": {"kind": "arithmetic"},
            "sampling": {"max_tokens": 32},
            "actor": {"dtype": dtype, "max_num_seqs": 64, "kv_cache_gib": 0.0625},
        }
    )


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied embeddings, like the small Qwen3 models."""
    return build_model_folder(tmp_path_factory.mktemp("models") / "tied")


@pytest.fixture(scope="session")
def untied_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model_folder(tmp_path_factory.mktemp("models") / "untied", tied=False)
