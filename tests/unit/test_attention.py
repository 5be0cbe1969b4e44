import importlib.util
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from lambdapo_async.errors import ConfigError, UserError
from learner.attention import PackedLayout, installed_flash_attention, padded_attention, select_attention
from learner.packing_check import check_packing
from tests.tiny_models import Architecture, layout_of, micro_batch, tiny_model

LENGTHS = (5, 1, 13, 2, 8)


def naive_attention(query: Tensor, key: Tensor, value: Tensor, marks: list[int], scaling: float) -> Tensor:
    """One document, one head, one query at a time."""
    share = query.shape[1] // key.shape[1]
    output = torch.zeros_like(query)
    for begin, end in pairwise(marks):
        for t in range(begin, end):
            for head in range(query.shape[1]):
                scores = key[begin : t + 1, head // share] @ query[t, head] * scaling
                output[t, head] = scores.softmax(0) @ value[begin : t + 1, head // share]
    return output


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_padded_attention_equals_one_query_at_a_time(kv_heads: int) -> None:
    torch.manual_seed(0)
    batch = micro_batch(LENGTHS)
    total = sum(LENGTHS)
    query, key, value = (torch.randn(total, heads, 8, dtype=torch.float64) for heads in (4, kv_heads, kv_heads))
    found = padded_attention(query, key, value, layout_of(batch), 0.3)
    torch.testing.assert_close(found, naive_attention(query, key, value, batch.cu_seqlens.tolist(), 0.3))


def test_layout_maps_every_token_to_its_slot_and_back() -> None:
    layout = PackedLayout(torch.tensor([0, 3, 4, 8], dtype=torch.int32), 4)
    single, others = layout.padded
    assert single.token_of_slot.tolist() == [[3]]
    assert others.token_of_slot.tolist() == [[0, 1, 2, 0], [4, 5, 6, 7]]
    assert others.is_token.tolist() == [[True, True, True, False], [True] * 4]
    assert layout.slot_of_token.tolist() == [1, 2, 3, 0, 5, 6, 7, 8]


@given(st.lists(st.integers(1, 300), min_size=1, max_size=30))
def test_every_token_has_one_slot_and_padding_less_than_doubles_the_work(lengths: list[int]) -> None:
    layout = layout_of(micro_batch(lengths))
    tokens = torch.cat([batch.token_of_slot.flatten() for batch in layout.padded])
    assert torch.equal(tokens[layout.slot_of_token], torch.arange(sum(lengths)))
    assert len(tokens) < 2 * sum(lengths)


def run(model: PreTrainedModel, ids_T: Tensor, positions_T: Tensor, layout: PackedLayout) -> Tensor:
    inputs = {"input_ids": ids_T[None], "position_ids": positions_T[None], "use_cache": False, "layout": layout}
    return model(**inputs).logits[0]


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
    alone = []
    for ids_T in batch.input_ids_T.split(LENGTHS):
        length = ids_T.shape[0]
        layout = PackedLayout(torch.tensor([0, length], dtype=torch.int32), length)
        alone.append(run(model, ids_T, torch.arange(length), layout))
    (torch.cat(alone) * upstream).sum().backward()
    torch.testing.assert_close(packed, torch.cat(alone))
    torch.testing.assert_close(packed_gradients, gradients(model))


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_packed_attention_equals_transformers_own(architecture: Architecture) -> None:
    ours, theirs = tiny_model(architecture), tiny_model(architecture)
    theirs.set_attn_implementation("eager")
    ids_T = micro_batch((17,)).input_ids_T
    layout = PackedLayout(torch.tensor([0, 17], dtype=torch.int32), 17)
    torch.testing.assert_close(run(ours, ids_T, torch.arange(17), layout), theirs(ids_T[None]).logits[0])


def test_a_sliding_window_shorter_than_a_document_is_refused() -> None:
    model = tiny_model(use_sliding_window=True, sliding_window=4, max_window_layers=0)
    batch = micro_batch((6,))
    with pytest.raises(UserError, match=r"sliding window \(4\)"):
        run(model, batch.input_ids_T, batch.position_ids_T, layout_of(batch))


def test_check_packing_passes_what_packs() -> None:
    check_packing(tiny_model("qwen3"))
    check_packing(tiny_model("llama"))


def test_check_packing_refuses_attention_across_documents() -> None:
    model = tiny_model("llama")
    decode = model.model.forward

    def decode_as_one_document(*, input_ids: Tensor, **inputs: object) -> object:
        total = input_ids.shape[1]
        one = PackedLayout(torch.tensor([0, total], dtype=torch.int32), total)
        return decode(input_ids=input_ids, **{**inputs, "layout": one})

    model.model.forward = decode_as_one_document
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


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Puts a package flash_attn with the given source on the path."""

    def write(source: str) -> None:
        (tmp_path / "flash_attn").mkdir()
        (tmp_path / "flash_attn" / "__init__.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path))

    yield write
    sys.modules.pop("flash_attn", None)


def test_a_broken_flash_attn_is_an_error_and_not_absence(install: Callable[[str], None]) -> None:
    install("raise ImportError('undefined symbol: _ZN3c104cuda')")
    with pytest.raises(ImportError, match="undefined symbol"):
        installed_flash_attention()


FAITHFUL = """
def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p=0.0, softmax_scale=None, causal=False):
    from learner.attention import PackedLayout, padded_attention
    assert causal and dropout_p == 0.0 and cu_q is cu_k and max_q == max_k
    return padded_attention(q, k, v, PackedLayout(cu_q, max_q), softmax_scale)
"""


def test_flash_attn_is_called_with_its_own_signature(install: Callable[[str], None]) -> None:
    install(FAITHFUL)
    kernel = installed_flash_attention()
    assert kernel is not None
    layout = layout_of(micro_batch(LENGTHS))
    inputs = [torch.randn(sum(LENGTHS), 4, 8) for _ in range(3)]
    assert torch.equal(kernel(*inputs, layout, 0.5), padded_attention(*inputs, layout, 0.5))


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash_attn is installed")
def test_an_absent_flash_attn_is_none() -> None:
    assert installed_flash_attention() is None


def test_the_cpu_takes_the_padded_kernel() -> None:
    assert select_attention(torch.device("cpu")) == "lambdapo_padded"
