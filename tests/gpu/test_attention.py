"""Every kernel that this GPU has against SDPA document by document; needs Ampere or newer."""

import pytest
import torch
from torch import Tensor

from lambdapo_async.packed_layout import PackedLayout, Segment, packed_layout
from learner.attention import select_attention
from learner.attention_kernels import (
    FLASH_PACKAGES,
    Backend,
    Scores,
    choose_backend,
    installed_module,
    sdpa_attention,
    varlen_attention,
)
from tests.reference.attention import naive_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CUDA = torch.device("cuda")
LENGTHS = (5, 1, 130, 2, 64, 333)
SEGMENTS = (Segment(130), Segment(64), Segment(200, range(130)), Segment(1, range(130)), Segment(140, range(130, 194)))
"""535 tokens as well, two prompts with completions longer and shorter than they are."""
LAYOUTS = {
    "documents": packed_layout([Segment(each) for each in LENGTHS]),
    "shared": packed_layout(SEGMENTS),
    "lone": packed_layout([Segment(sum(LENGTHS))]),
}
CUTE_WARNS = pytest.mark.filterwarnings("ignore::DeprecationWarning")
"""flash-attn 4 uses what its own compiler calls deprecated."""
NAMES = ["lambdapo_varlen", *(package.name for package in FLASH_PACKAGES)]


def backend_of(name: str) -> Backend:
    """The named backend; skips where the package is absent or does not run on this GPU."""
    only = {package.module for package in FLASH_PACKAGES if package.name == name}
    found = choose_backend(
        torch.cuda.get_device_capability(), lambda module: installed_module(module) if module in only else None
    )
    if found.name != name:
        pytest.skip(f"{name} is not installed or does not run on this GPU")
    return found


def states(kv_heads: int, size: int) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(sum(LENGTHS), heads, size) for heads in (8, kv_heads, kv_heads)]
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]


@CUTE_WARNS
@pytest.mark.parametrize("window", [None, 1, 17, 200])
@pytest.mark.parametrize(("kv_heads", "size"), [(2, 64), (8, 64), (4, 128), (8, 32)])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_kernels_equal_sdpa_forward_and_gradient(
    name: str, layout: PackedLayout, kv_heads: int, size: int, window: int | None
) -> None:
    layout, scores = layout.to(CUDA), Scores(size**-0.5, window)
    results = []
    for kernel, dtype in ((backend_of(name).kernel, torch.bfloat16), (sdpa_attention, torch.float32)):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in states(kv_heads, size)]
        output = kernel(*inputs, layout, scores)
        gradients = torch.autograd.grad(output.float().square().sum(), inputs)
        results.append([tensor.float() for tensor in (output, *gradients)])
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() < 1e-2 * (1 + expected.norm())  # a window of one has gradients of 0


@CUTE_WARNS
@pytest.mark.parametrize("name", [package.name for package in FLASH_PACKAGES])
def test_soft_caps_equal_the_naive_formula(name: str) -> None:
    scores = Scores(1.0, 11, 2.0)
    layout = packed_layout([Segment(9), Segment(17, range(9)), Segment(13, range(9))]).to(CUDA)
    results = []
    for kernel, dtype in ((backend_of(name).kernel, torch.bfloat16), (naive_attention, torch.float32)):
        inputs = [tensor[:39].to(dtype).requires_grad_() for tensor in states(2, 64)]
        output = kernel(*inputs, layout, scores)
        gradients = torch.autograd.grad(output.float().square().sum(), inputs)
        results.append([tensor.float() for tensor in (output, *gradients)])
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() < 1e-2 * (1 + expected.norm())  # a window of one has gradients of 0


@CUTE_WARNS
def test_flash_attn_4_equals_sdpa_on_values_narrower_than_keys() -> None:
    backend = backend_of("lambdapo_fa4")
    if backend.narrow is None:
        pytest.skip("not on this GPU")
    size, value_size = backend.narrow
    results = []
    for kernel, dtype in ((backend.kernel, torch.bfloat16), (sdpa_attention, torch.float32)):
        query, key, value = (tensor.to(dtype) for tensor in states(8, size))
        inputs = [each.requires_grad_() for each in (query, key, value[..., :value_size].contiguous())]
        output = kernel(*inputs, LAYOUTS["documents"].to(CUDA), Scores(size**-0.5))
        gradients = torch.autograd.grad(output.float().square().sum(), inputs)
        results.append([tensor.float() for tensor in (output, *gradients)])
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() < 1e-2 * (1 + expected.norm())


def test_a_gpu_of_ampere_or_newer_takes_a_packed_kernel() -> None:
    assert select_attention(CUDA) in NAMES


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_the_packed_path_waits_for_no_gpu() -> None:
    layout, inputs = LAYOUTS["shared"].to(CUDA), states(8, 64)
    torch.cuda.set_sync_debug_mode("error")  # says that it is a prototype, see the mark
    try:
        varlen_attention(*inputs, layout, Scores(0.125))
        assert layout.squares > layout.num_tokens > 0
    finally:
        torch.cuda.set_sync_debug_mode("default")
