"""A model that cannot be trained on packed sequences is refused before the first step."""

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3Config, JambaConfig, Phi3Config, PreTrainedConfig, StableLmConfig

from lambdapo_async.errors import ConfigError, UserError
from lambdapo_async.packed_layout import PackedLayout, Segment, packed_layout
from learner.attention import select_attention
from learner.packing_check import check_packing, packable_positions
from tests.tiny_models import SIZES, tiny_model


def test_check_packing_passes_what_packs() -> None:
    check_packing(tiny_model("qwen3"))
    check_packing(tiny_model("llama"))


def test_check_packing_refuses_attention_across_documents() -> None:
    model = tiny_model("llama")
    decode = model.model.forward

    def decode_as_one_document(*, input_ids: Tensor, **inputs: object) -> object:
        total = input_ids.shape[1]
        one = packed_layout([Segment(total)])
        return decode(input_ids=input_ids, **{**inputs, "layout": one})

    model.model.forward = decode_as_one_document
    with pytest.raises(ConfigError, match="cannot be trained on packed sequences"):
        check_packing(model)


def test_a_full_device_is_not_laid_on_the_model() -> None:
    model = tiny_model("llama")

    def decode(**_: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.model.forward = decode
    with pytest.raises(torch.OutOfMemoryError):
        check_packing(model)


def test_check_packing_refuses_tokens_that_mix_with_their_neighbours() -> None:
    """As convolutions and recurrences do, if only within documents: a second completion follows the first there."""
    model = tiny_model("llama")
    decode = model.model.forward

    def decode_with_neighbours(*, layout: PackedLayout, **inputs: object) -> object:
        output = decode(layout=layout, **inputs)
        before = output.last_hidden_state.roll(1, dims=1)
        before[:, layout.cu_seqlens[:3].clamp(max=before.shape[1] - 1).long()] = 0  # not across documents
        output.last_hidden_state = output.last_hidden_state + before
        return output

    model.model.forward = decode_with_neighbours
    with pytest.raises(ConfigError, match="cannot be trained on packed sequences"):
        check_packing(model)


def test_check_packing_refuses_an_output_layer_that_scales() -> None:
    model = tiny_model("llama")
    forward = model.forward

    def scaled(**inputs: object) -> object:
        output = forward(**inputs)
        output.logits = output.logits * 1.05
        return output

    model.forward = scaled
    with pytest.raises(ConfigError, match="cannot be trained on packed sequences"):
        check_packing(model)


def test_check_packing_refuses_chunks_which_only_long_documents_would_show() -> None:
    model = tiny_model("llama")
    model.config.layer_types = ["chunked_attention", "full_attention"]
    with pytest.raises(ConfigError, match="layers of chunked_attention, which packed training does not support"):
        check_packing(model)


def test_check_packing_refuses_state_spaces_that_mix_little_before_they_are_trained() -> None:
    sizes = {**SIZES, "num_experts": 1, "mamba_d_state": 8}
    config = JambaConfig(**sizes, attn_layer_period=2, attn_layer_offset=1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=select_attention(torch.device("cpu")))
    with pytest.raises(ConfigError, match="JambaForCausalLM has layers of convolutions"):
        check_packing(model.eval())


def test_check_packing_refuses_layers_that_are_not_told_the_layout() -> None:
    config = StableLmConfig(**{**SIZES, "head_dim": None})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=select_attention(torch.device("cpu")))
    with pytest.raises(UserError, match="StableLmAttention is not told which tokens are packed together"):
        check_packing(model.eval())


def test_check_packing_refuses_a_model_that_fails_in_its_own_way() -> None:
    model = tiny_model("llama")

    def choosy(**_: object) -> object:
        raise TypeError("'NoneType' object is not subscriptable")

    model.model.forward = choosy
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM cannot be run on packed sequences, .* not subscriptable"):
        check_packing(model)


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48, "long_factor": [8.0] * 48}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (Phi3Config(max_position_embeddings=128, original_max_position_embeddings=16, rope_parameters=LONGROPE), 16),
        (Phi3Config(max_position_embeddings=128), 128),
        (Gemma3Config(text_config={"model_type": "gemma3_text", "max_position_embeddings": 128}), 128),
    ],
    ids=["longrope", "plain", "the text part of several"],
)
def test_packable_positions_end_where_a_long_sequence_would_change_its_neighbours(
    config: PreTrainedConfig, expected: int
) -> None:
    assert packable_positions(config) == expected
