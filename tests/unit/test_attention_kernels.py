"""Which attention kernel a device gets, and that each is called with its own signature."""

import tomllib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.machine import ROOT
from lambdapo_async.errors import UserError
from lambdapo_async.packed_layout import PackedLayout, Segment, SharedKeys, packed_layout
from learner.attention import register_attention, select_attention
from learner.attention_kernels import (
    FLASH_PACKAGES,
    Backend,
    Scores,
    choose_backend,
    installed_module,
    sdpa_attention,
    varlen_attention,
)
from learner.flash4 import takes
from tests.attention_inputs import LAYOUTS, forward_and_gradients, states
from tests.reference.attention import naive_attention
from tests.tiny_models import tiny_model

BLACKWELL, HOPPER, AMPERE, TURING = (10, 0), (9, 0), (8, 0), (7, 5)


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
    assert is_blackwells(q.shape[-1], v.shape[-1])
    layout = layout_given(causal, window_size, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    assert return_lse
    log_sum_HT = torch.zeros(q.shape[1], q.shape[0])
    return naive_attention(q, k, v, layout, scores_of(softmax_scale, window_size[0], softcap)), log_sum_HT


def is_blackwells(size: int, value_size: int) -> bool:
    """What flash-attn-4 asserts there, before it runs."""
    return size % 8 == value_size % 8 == 0 and (
        (size <= 128 and value_size <= 128) or (size, value_size) in ((192, 128), (256, 256))
    )


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
    assert is_blackwells(q.shape[-1], v.shape[-1])
    assert q.shape[-1] != 256 or (softcap == 0 and window_size_left is None)
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


def heads(num_tokens: int, size: int, value_size: int) -> list[Tensor]:
    """Queries and keys of one size, values of another."""
    query, key, value = states((num_tokens,), 2, size)
    return [query, key, value.detach()[..., :value_size].requires_grad_()]


@pytest.mark.parametrize(
    ("size", "value_size", "scores"),
    [
        (64, 64, Scores(0.1, 3, 0.7)),
        (192, 128, Scores(0.1)),
        (256, 256, Scores(0.1)),
    ],
)
def test_flash_attn_4_on_blackwell_gets_the_heads_that_it_takes(size: int, value_size: int, scores: Scores) -> None:
    layout, backend = packed_layout([Segment(7)]), choose_backend(BLACKWELL, packages(flash4=flash4))
    found, expected = (
        forward_and_gradients(kernel, heads(7, size, value_size), layout, scores)
        for kernel in (backend.kernel, naive_attention)
    )
    torch.testing.assert_close(found, expected)


def test_a_compiler_is_told_the_size_of_narrow_values() -> None:
    backend = choose_backend(BLACKWELL, packages(flash4=flash4))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = [mode.from_tensor(each.detach()) for each in heads(7, 192, 128)]
        output = backend.kernel(*inputs, packed_layout([Segment(7)]), Scores(0.1))
    assert output.shape == (7, 4, 128)


@pytest.mark.parametrize(
    ("size", "scores"),
    [(192, Scores(0.1)), (160, Scores(0.1)), (20, Scores(0.1)), (256, Scores(0.1, 3))],
    ids=["192", "160", "20", "256 with a window"],
)
def test_what_flash_attn_4_refuses_on_blackwell_goes_to_torchs_kernel(size: int, scores: Scores) -> None:
    """Some of it in the backward pass only."""
    backend = choose_backend(BLACKWELL, packages(flash4=flash4))
    with pytest.raises(NotImplementedError, match="flash_attention_forward"):  # which no CPU has
        backend.kernel(*heads(7, size, size), packed_layout([Segment(7)]), scores)


@pytest.mark.parametrize(("size", "softcap"), [(256, 50.0), (192, 50.0), (512, None)])
def test_heads_that_nobody_trains_on_blackwell_are_refused_in_the_forward_pass(
    size: int, softcap: float | None
) -> None:
    backend = choose_backend(BLACKWELL, packages(flash4=flash4))
    with pytest.raises(UserError, match=rf"attention heads of {size}.*install flash-attn in place of flash-attn-4"):
        backend.kernel(*heads(7, size, size), packed_layout([Segment(7)]), Scores(0.1, None, softcap))


@pytest.mark.parametrize(
    ("capability", "sizes", "is_plain", "taken"),
    [
        (HOPPER, (256, 256), False, True),
        (HOPPER, (192, 128), True, True),
        (HOPPER, (20, 20), True, False),
        ((10, 3), (192, 128), False, True),
        ((11, 0), (256, 256), True, True),
        ((12, 0), (128, 128), False, True),
        ((12, 0), (192, 128), True, False),
        ((12, 0), (256, 256), True, False),
    ],
)
def test_each_gpu_has_head_sizes_of_its_own(
    capability: tuple[int, int], sizes: tuple[int, int], is_plain: bool, taken: bool
) -> None:
    assert takes(capability, *sizes, is_plain) == taken
    narrow = choose_backend(capability, packages(flash4=flash4)).narrow
    assert narrow == ((192, 128) if capability < (12, 0) else None)


@pytest.mark.parametrize("advice", ["README.md", "scripts/setup"])
def test_the_advice_is_the_version_of_flash_attn_4_that_the_extra_installs(advice: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (requirement,) = extras["flash4"]
    assert f"pip install {requirement}" in (ROOT / advice).read_text()


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
