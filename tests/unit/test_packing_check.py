"""A model that cannot be trained on packed sequences is refused before the first step."""

import pytest
from torch import Tensor

from lambdapo_async.errors import ConfigError
from lambdapo_async.packed_layout import PackedLayout, Segment, packed_layout
from learner.packing_check import check_packing
from tests.tiny_models import tiny_model


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
        output.logits = output.logits * 2
        return output

    model.forward = scaled
    with pytest.raises(ConfigError, match="cannot be trained on packed sequences"):
        check_packing(model)


def test_check_packing_refuses_chunks_which_only_long_documents_would_show() -> None:
    model = tiny_model("llama")
    model.config.layer_types = ["chunked_attention", "full_attention"]
    with pytest.raises(ConfigError, match="layers of chunked_attention, which packed training does not support"):
        check_packing(model)
