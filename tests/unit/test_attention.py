"""Packed attention is each document's own: against one query at a time, and against transformers' models."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from lambdapo_async.errors import UserError
from lambdapo_async.packed_layout import PackedLayout, Segment, packed_layout
from learner.attention import register_attention, select_attention
from learner.attention_kernels import Backend, Scores, choose_backend, gathered, sdpa_attention
from learner.packing_check import check_packing
from tests.attention_inputs import LAYOUTS, LENGTHS, forward_and_gradients, states
from tests.reference.attention import naive_attention
from tests.tiny_models import SIZES, Architecture, layout_of, micro_batch, tiny_model


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("window", [None, 1, 3, 13, 50])
@pytest.mark.parametrize(("kv_heads", "size"), [(1, 8), (2, 6), (4, 17)])
def test_sdpa_equals_one_query_at_a_time_forward_and_gradient(
    kv_heads: int, size: int, window: int | None, layout: PackedLayout
) -> None:
    scores = Scores(0.3, window)
    found, expected = (
        forward_and_gradients(kernel, states((layout.num_tokens,), kv_heads, size), layout, scores)
        for kernel in (sdpa_attention, naive_attention)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("window", [None, 3])
def test_a_document_is_the_same_to_the_last_bit_in_any_company(window: int | None) -> None:
    alone = [each[6:19].detach() for each in states(LENGTHS, 2, 8)]
    found = sdpa_attention(*states(LENGTHS, 2, 8), layout_of(micro_batch(LENGTHS)), Scores(0.3, window))
    assert torch.equal(found[6:19], sdpa_attention(*alone, layout_of(micro_batch((13,))), Scores(0.3, window)))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30))
def test_runs_are_the_documents_in_order(lengths: list[int]) -> None:
    runs = layout_of(micro_batch(lengths)).runs
    assert [(tokens, keys) for segments, tokens, keys in runs for _ in range(segments)] == [(n, n) for n in lengths]
    assert all(one != other for (_, *one), (_, *other) in pairwise(runs))


def test_a_layout_tells_each_segments_keys() -> None:
    layout = packed_layout([Segment(3), Segment(2), Segment(2, range(3)), Segment(1, range(3, 5))])
    assert layout.runs == ((1, 3, 3), (1, 2, 2), (1, 2, 5), (1, 1, 3))
    assert (layout.num_tokens, layout.max_seqlen, layout.max_keys) == (8, 3, 5)
    assert layout.shared is not None
    assert layout.shared.index_K.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 3, 4, 7]
    assert layout.squares == 3**2 + 2**2 + (5**2 - 3**2) + (3**2 - 2**2)
    assert packed_layout([Segment(3), Segment(2)]).shared is None


def test_gradients_of_a_shared_prompt_are_added_in_float32() -> None:
    """1 + 256 small ones: in bfloat16 each alone would be rounded away."""
    layout = packed_layout([Segment(1), *[Segment(1, range(1))] * 257])
    states_THD = torch.zeros(258, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.full((515, 1, 1), 2.0**-9, dtype=torch.bfloat16)
    upstream[0] = 1.0
    (gradient,) = torch.autograd.grad(gathered(states_THD, layout), states_THD, upstream)
    assert gradient.dtype == torch.bfloat16
    assert float(gradient[0, 0, 0]) == 1.5


def run(model: PreTrainedModel, ids_T: Tensor, positions_T: Tensor, layout: PackedLayout) -> Tensor:
    inputs = {"input_ids": ids_T[None], "position_ids": positions_T[None], "use_cache": False, "layout": layout}
    return model(**inputs).logits[0]


def run_alone(model: PreTrainedModel, ids_T: Tensor) -> Tensor:
    length = ids_T.shape[0]
    return run(model, ids_T, torch.arange(length), packed_layout([Segment(length)]))


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_packed_documents_equal_each_document_alone_forward_and_gradient(architecture: Architecture) -> None:
    model = tiny_model(architecture).double()
    batch = micro_batch(LENGTHS)
    upstream = torch.randn(sum(LENGTHS), 61, dtype=torch.float64)
    packed = run(model, batch.input_ids_T, batch.position_ids_T, layout_of(batch))
    (packed * upstream).sum().backward()
    packed_gradients = gradients(model)
    alone = torch.cat([run_alone(model, ids_T) for ids_T in batch.input_ids_T.split(LENGTHS)])
    (alone * upstream).sum().backward()
    torch.testing.assert_close(packed, alone)
    torch.testing.assert_close(packed_gradients, gradients(model))


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_packed_attention_equals_transformers_own(architecture: Architecture) -> None:
    ours, theirs = tiny_model(architecture), tiny_model(architecture)
    theirs.set_attn_implementation("eager")
    ids_T = micro_batch((17,)).input_ids_T
    torch.testing.assert_close(run_alone(ours, ids_T), theirs(ids_T[None]).logits[0])


WINDOWED = [
    MistralConfig(**SIZES, sliding_window=4),
    Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    Gemma3TextConfig(**SIZES, sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
]


@pytest.mark.parametrize("config", WINDOWED, ids=lambda config: config.model_type)
def test_sliding_windows_equal_transformers_own_forward_and_gradient(config: PreTrainedConfig) -> None:
    model = AutoModelForCausalLM.from_config(config).double().eval()
    batch, upstream = micro_batch(LENGTHS), torch.randn(sum(LENGTHS), 61, dtype=torch.float64)
    results = []
    for implementation in ("sdpa", select_attention(torch.device("cpu"))):
        model.set_attn_implementation(implementation)
        if implementation == "sdpa":
            logits = torch.cat([model(ids_T[None]).logits[0] for ids_T in batch.input_ids_T.split(LENGTHS)])
        else:
            logits = run(model, batch.input_ids_T, batch.position_ids_T, layout_of(batch))
            check_packing(model)
        (logits * upstream).sum().backward()
        results.append((logits, gradients(model)))
    # Norms and rotations round to float32 inside.
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("missing", [0, 3])
def test_values_narrower_than_keys_equal_the_naive_formula(missing: int) -> None:
    query, key, value = (each.detach() for each in states((7, 4), 2, 8))
    value = value[..., : 8 - missing]
    layout = layout_of(micro_batch((7, 4)))
    found = layer(Backend("lambdapo_test", sdpa_attention, softcap=False), query, key, value, layout=layout)
    wide = torch.nn.functional.pad(value, (0, missing))
    expected = naive_attention(query, key, wide, layout, Scores(8**-0.5))[..., : 8 - missing]
    torch.testing.assert_close(found, expected)


def test_values_stay_narrow_where_the_backend_takes_them_so() -> None:
    query, key, value = (each.detach() for each in states((7, 4), 2, 8))
    seen = []

    def kernel(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scores: Scores) -> Tensor:
        seen.append(value.shape[-1])
        return naive_attention(query, key, value, layout, scores)

    for narrow in ((8, 5), (8, 4), None):
        backend = Backend("lambdapo_test", kernel, softcap=False, narrow=narrow)
        found = layer(backend, query, key, value[..., :5], layout=layout_of(micro_batch((7, 4))))
        assert found.shape == (11, 4, 5)
    assert seen == [5, 8, 8]


def layer(backend: Backend, query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
    """What a model's attention layer gets for packed states."""
    attend = AttentionInterface()[register_attention(backend)]
    rows = [each.transpose(0, 1)[None] for each in (query, key, value)]
    return attend(torch.nn.Identity(), *rows, None, **options)[0][0]


def test_a_soft_cap_reaches_the_kernel_that_can_and_is_refused_by_the_one_that_cannot() -> None:
    inputs, layout = [each.detach() for each in states((7, 4), 2, 8)], layout_of(micro_batch((7, 4)))
    options = {"layout": layout, "scaling": 0.3, "softcap": 0.5, "sliding_window": 3}
    found = layer(Backend("lambdapo_test", naive_attention, softcap=True), *inputs, **options)
    assert torch.equal(found, naive_attention(*inputs, layout, Scores(0.3, 3, 0.5)))
    assert not torch.equal(found, naive_attention(*inputs, layout, Scores(0.3, 3)))
    with pytest.raises(UserError, match=r"caps its attention scores at 0.5, which lambdapo_sdpa cannot"):
        layer(choose_backend(None), *inputs, **options)


def test_attention_sinks_are_refused() -> None:
    inputs, layout = states((3,), 2, 8), layout_of(micro_batch((3,)))
    with pytest.raises(UserError, match="mask or attention sinks"):
        layer(choose_backend(None), *inputs, layout=layout, s_aux=torch.zeros(4))
