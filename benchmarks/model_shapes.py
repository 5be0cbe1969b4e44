"""Qwen3-shaped models with random weights: speed and memory do not depend on what they know."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from learner.character_tokenizer import build_tokenizer
from learner.flops import ModelFlops
from learner.starter import ARITHMETIC

MAX_LENGTH = 32_768
CHARACTER_VOCAB = len(build_tokenizer(MAX_LENGTH))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What a model's cost depends on."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool

    def write(self, folder: Path) -> None:
        """A folder in Hugging Face's format with random bfloat16 weights, the same at every call."""
        torch.manual_seed(0)
        self._build().to(torch.bfloat16).save_pretrained(folder)
        build_tokenizer(MAX_LENGTH).save_pretrained(folder)

    def flops(self) -> ModelFlops:
        """What its multiplications cost."""
        with torch.device("meta"):
            return ModelFlops.of(self._build())

    def _build(self) -> Qwen3ForCausalLM:
        tokenizer = build_tokenizer(MAX_LENGTH)
        config = Qwen3Config(
            **asdict(self),
            max_position_embeddings=MAX_LENGTH,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        return Qwen3ForCausalLM(config)


STARTER = ModelShape(
    hidden_size=ARITHMETIC.hidden_size,
    intermediate_size=ARITHMETIC.intermediate_size,
    num_hidden_layers=ARITHMETIC.num_layers,
    num_attention_heads=ARITHMETIC.num_heads,
    num_key_value_heads=ARITHMETIC.num_key_value_heads,
    head_dim=ARITHMETIC.head_size,
    vocab_size=CHARACTER_VOCAB,
    tie_word_embeddings=False,
)
QWEN3_06B = ModelShape(
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151_936,
    tie_word_embeddings=True,
)
QWEN3_17B = replace(QWEN3_06B, hidden_size=2048, intermediate_size=6144)

SHAPES: Mapping[str, ModelShape] = MappingProxyType({"starter": STARTER, "0.6b": QWEN3_06B, "1.7b": QWEN3_17B})
WIDE: Mapping[str, ModelShape] = MappingProxyType(
    {
        # One layer under a real vocabulary: what is left of memory is the output layer's.
        "cpu": replace(
            QWEN3_06B,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
        ),
        "cuda": replace(QWEN3_06B, num_hidden_layers=1),
    }
)
