from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType

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

from lambdapo_async.errors import ConfigError, UserError
from lambdapo_async.packed_layout import PackedLayout, Segment, SharedKeys, packed_layout
from learner.attention import register_attention, select_attention
from learner.attention_kernels import (
    FLASH_PACKAGES,
    Backend,
    Kernel,
    Scores,
    choose_backend,
    gathered,
    installed_module,
    sdpa_attention,
    varlen_attention,
)
from learner.packing_check import check_packing
from tests.tiny_models import SIZES, Architecture, layout_of, micro_batch, tiny_model

LENGTHS = (5, 1, 13, 13, 2, 8)
SHARED = packed_layout(
    [
        *(Segment(length) for length in (9, 4, 4)),
        *(Segment(6, range(9, 13)), Segment(6, range(13, 17)), Segment(6, range(9)), Segment(2, range(9)), Segment(1)),
    ]
)
"""38 tokens: prompts of 9, 4 and 4 with completions, the last two twice as long as those, and a document at the end."""
LAYOUTS = {"documents": packed_layout([Segment(length) for length in LENGTHS]), "shared": SHARED}
BLACKWELL, HOPPER, AMPERE, TURING = (10, 0), (9, 0), (8, 0), (7, 5)


def naive_attention(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scores: Scores) -> Tensor:
    """One segment, one head, one query at a time."""
    share = query.shape[1] // key.shape[1]
    output = torch.zeros_like(query)
    tokens_K = torch.arange(layout.num_tokens) if layout.shared is None else layout.shared.index_K
    bounds = zip(pairwise(layout.cu_seqlens.tolist()), pairwise(layout.key_marks.tolist()), strict=True)
    for (begin, end), (first, last) in bounds:
        for t in range(begin, end):
            seen = tokens_K[first : last - end + t + 1]
            seen = seen if scores.window is None else seen[-scores.window :]
            for head in range(query.shape[1]):
                score = key[seen, head // share] @ query[t, head] * scores.scale
                if scores.softcap is not None:
                    score = scores.softcap * (score / scores.softcap).tanh()
                output[t, head] = score.softmax(0) @ value[seen, head // share]
    return output


def states(lengths: tuple[int, ...], kv_heads: int, size: int, *, heads: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), count, size) for count in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def forward_and_gradients(kernel: Kernel, inputs: list[Tensor], layout: PackedLayout, scores: Scores) -> list[Tensor]:
    output = kernel(*inputs, layout, scores)
    upstream = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output, *torch.autograd.grad(output, inputs, upstream)]


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


def flash4(  # the parameters of flash-attn-4 4.0 up to softcap
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    assert window_size[0] is None or window_size[0] >= 0  # it takes -1 for a bound
    layout = layout_given(causal, window_size, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    assert return_lse
    log_sum_HT = torch.zeros(q.shape[1], q.shape[0])
    return naive_attention(q, k, v, layout, scores_of(softmax_scale, window_size[0], softcap)), log_sum_HT


def flash4_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    *,
    softmax_scale: float,
    causal: bool,
    softcap: float,
    window_size_left: int | None,
    window_size_right: int,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient written out, one segment and head at a time; out and lse are what the forward pass said."""
    marks = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    layout = layout_given(causal, (window_size_left, window_size_right), *marks)
    grad_q, grad_k, grad_v = (torch.zeros_like(states) for states in (q, k, v))
    share, window = q.shape[1] // k.shape[1], layout.max_keys if window_size_left is None else window_size_left
    for (begin, end), (first, last) in zip(
        pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True
    ):
        rows, keys = slice(begin, end), slice(first, last)
        distance = torch.arange(last - first - end + begin, last - first)[:, None] - torch.arange(last - first)
        for head in range(q.shape[1]):
            raw = q[rows, head] @ k[keys, head // share].T * softmax_scale
            capped = softcap * (raw / softcap).tanh() if softcap else raw
            slope = 1 - (capped / softcap) ** 2 if softcap else torch.ones_like(raw)
            p = capped.masked_fill((distance < 0) | (distance > window), -torch.inf).softmax(1)
            grad_p = dout[rows, head] @ v[keys, head // share].T
            grad_raw = p * (grad_p - (grad_p * p).sum(1, keepdim=True)) * slope * softmax_scale
            grad_q[rows, head] = grad_raw @ k[keys, head // share]
            grad_k[keys, head // share] += grad_raw.T @ q[rows, head]
            grad_v[keys, head // share] += p.T @ dout[rows, head]
    return grad_q, grad_k, grad_v


def flash3(  # the parameters of flash-attn-3 up to softcap
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    layout = layout_given(causal, window_size, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    left = None if window_size[0] == -1 else window_size[0]
    return naive_attention(q, k, v, layout, scores_of(softmax_scale, left, softcap))


def flash2(  # the parameters of flash-attn 2.8 up to softcap
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Tensor:
    assert dropout_p == 0
    layout = layout_given(causal, window_size, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    left = None if window_size[0] == -1 else window_size[0]
    return naive_attention(q, k, v, layout, scores_of(softmax_scale, left, softcap))


def layout_given(
    causal: bool,
    window_size: tuple[int | None, int | None],
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> PackedLayout:
    assert causal
    assert window_size[1] == 0
    assert cu_seqlens_q is not None
    assert max_seqlen_q is not None
    assert cu_seqlens_k is not None
    assert max_seqlen_k == cu_seqlens_k.diff().max()
    keys = SharedKeys(cu_seqlens_k, max_seqlen_k, torch.arange(int(cu_seqlens_k[-1])))
    shapes = tuple(zip(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist(), strict=True))
    return PackedLayout(cu_seqlens_q, max_seqlen_q, shapes, keys)


def scores_of(scale: float | None, left: int | None, softcap: float) -> Scores:
    assert scale is not None
    return Scores(scale, None if left is None else left + 1, softcap or None)


def packages(**functions: Callable[..., object]) -> Callable[[str], ModuleType | None]:
    """An environment with these generations of flash-attn, as ``choose_backend`` asks for them."""
    names = {"flash4": "flash_attn.cute", "flash3": "flash_attn_interface", "flash2": "flash_attn.flash_attn_interface"}
    modules: dict[str, ModuleType] = {}
    for generation, function in functions.items():
        module = ModuleType(names[generation])
        module.flash_attn_varlen_func = function  # type: ignore[attr-defined]
        modules[names[generation]] = module
        if generation == "flash4":
            interface = ModuleType("flash_attn.cute.interface")
            interface._flash_attn_bwd = flash4_backward  # type: ignore[attr-defined]
            modules[interface.__name__] = interface
    return modules.get


@pytest.mark.parametrize("function", [flash4, flash3, flash2], ids=lambda function: function.__name__)
@pytest.mark.parametrize("scores", [Scores(0.3), Scores(0.3, 3), Scores(0.3, None, 0.7), Scores(0.3, 1, 0.7)])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_flash_attn_is_called_with_its_own_signature(
    function: Callable[..., object], scores: Scores, layout: PackedLayout
) -> None:
    backend = choose_backend(HOPPER, packages(**{function.__name__: function}))
    assert backend.name == f"lambdapo_{function.__name__.replace('flash', 'fa')}"
    assert backend.softcap
    found, expected = (
        forward_and_gradients(kernel, states((layout.num_tokens,), 2, 8), layout, scores)
        for kernel in (backend.kernel, naive_attention)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("capability", "present", "chosen"),
    [
        (BLACKWELL, "flash4 flash3 flash2", "flash4"),
        (BLACKWELL, "flash3 flash2", "flash2"),
        (BLACKWELL, "flash3", "varlen"),
        (HOPPER, "flash4 flash3 flash2", "flash4"),
        (HOPPER, "flash3 flash2", "flash3"),
        (AMPERE, "flash4 flash3 flash2", "flash2"),
        (AMPERE, "flash4", "varlen"),
        (AMPERE, "", "varlen"),
        (TURING, "flash4 flash3 flash2", "sdpa"),
        (None, "flash4 flash3 flash2", "sdpa"),
    ],
)
def test_the_newest_kernel_that_runs_on_the_device_is_chosen(
    capability: tuple[int, int] | None, present: str, chosen: str
) -> None:
    functions: dict[str, Callable[..., object]] = {"flash4": flash4, "flash3": flash3, "flash2": flash2}
    load = packages(**{name: functions[name] for name in present.split()})
    assert choose_backend(capability, load).name == f"lambdapo_{chosen.replace('flash', 'fa')}"


def test_transformers_takes_no_backend_for_its_own() -> None:
    """It looks for a package of its own, or a download, behind any name with "flash" in it."""
    model = tiny_model("qwen3")
    for name in ("lambdapo_varlen", *(package.name for package in FLASH_PACKAGES)):
        model.set_attn_implementation(register_attention(Backend(name, sdpa_attention, softcap=True)))
        assert model.config._attn_implementation == name


def test_without_a_package_a_gpu_takes_torchs_own() -> None:
    assert choose_backend(HOPPER, lambda _: None).kernel is varlen_attention


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a module with the given source on the path."""

    def write(path: str, source: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(source)

    monkeypatch.syspath_prepend(str(tmp_path))
    return write


def test_a_broken_package_is_an_error_and_not_absence(install: Callable[[str, str], None]) -> None:
    install("broken_flash_attn.py", "raise ImportError('undefined symbol: _ZN3c104cuda')")
    with pytest.raises(ImportError, match="undefined symbol"):
        installed_module("broken_flash_attn")


def test_a_namespace_without_the_module_is_absence(install: Callable[[str, str], None]) -> None:
    install("flash_namespace/cute/__init__.py", "generation = 4")
    found = installed_module("flash_namespace.cute")
    assert found is not None
    assert found.generation == 4
    assert installed_module("flash_namespace.flash_attn_interface") is None
    assert installed_module("flash_nowhere.cute") is None


def test_the_cpu_takes_sdpa() -> None:
    assert select_attention(torch.device("cpu")) == "lambdapo_sdpa"
