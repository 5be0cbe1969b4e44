"""Tiny random models of real architectures, and micro-batches for them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config, Qwen3MoeConfig, set_seed

from lambdapo_async.packed_layout import PackedLayout, Segment, packed_layout
from lambdapo_async.packing import MicroBatch
from learner.attention import select_attention

Architecture = Literal["qwen3", "llama", "qwen3_moe"]
VOCAB = 61
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}


def tiny_model(architecture: Architecture = "qwen3", *, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random model of 30,000 parameters with our packed attention; Qwen3 ties its embeddings, the others do not."""
    set_seed(seed)
    kind = {"qwen3": Qwen3Config, "llama": LlamaConfig, "qwen3_moe": Qwen3MoeConfig}[architecture]
    if architecture == "qwen3_moe":
        changes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, **changes}
    config = kind(**{**SIZES, "tie_word_embeddings": architecture == "qwen3", **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=select_attention(torch.device("cpu")))
    with torch.no_grad():  # larger than the usual initialisation, so that attention and norms matter
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def tiny_model_folder(folder: Path, architecture: Architecture = "qwen3", *, seed: int = 0) -> Path:
    """The same model in Hugging Face's layout, with a stand-in for tokenizer files."""
    tiny_model(architecture, seed=seed).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def micro_batch(lengths: Sequence[int], *, prompt: int = 2, seed: int = 0, ids: Tensor | None = None) -> MicroBatch:
    """Documents of random tokens; the first ``prompt`` of each carry no loss."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    segments_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    drawn_T = torch.randint(VOCAB, (total,), generator=generator)
    return MicroBatch(
        input_ids_T=drawn_T if ids is None else ids,
        position_ids_T=positions_T,
        predictor_T=torch.arange(total) - (positions_T > 0).long(),
        layout=packed_layout([Segment(length) for length in lengths]),
        loss_mask_T=positions_T >= max(1, prompt),
        behavior_logprobs_T=-torch.rand(total, generator=generator),
        advantages_T=torch.randn(total, generator=generator),
        token_versions_T=torch.zeros(total, dtype=torch.int64),
        segment_ids_T=segments_T,
        num_loss_tokens=int((positions_T >= max(1, prompt)).sum()),
        group_keys=tuple(map(str, range(len(lengths)))),
    )


def layout_of(batch: MicroBatch) -> PackedLayout:
    """What the attention layers are told."""
    return batch.layout
