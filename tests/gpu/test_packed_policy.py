"""The CUDA kernels against the CPU's padded SDPA; needs a GPU of Ampere or newer."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lambdapo_async.config.learner import LearnerConfig
from learner.attention import PackedLayout, padded_attention, select_attention, varlen_attention
from learner.policy import Policy
from tests.tiny_models import layout_of, micro_batch, tiny_model_folder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LENGTHS = (5, 1, 130, 2, 64)


def attention_inputs(kv_heads: int) -> list[Tensor]:
    torch.manual_seed(0)
    total = sum(LENGTHS)
    return [torch.randn(total, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, kv_heads, kv_heads)]


@pytest.mark.parametrize("kv_heads", [2, 8])
def test_varlen_equals_padded_forward_and_gradient(kv_heads: int) -> None:
    batch = micro_batch(LENGTHS)
    layout = PackedLayout(batch.cu_seqlens.cuda(), batch.max_seqlen)
    results = []
    for kernel, dtype in ((varlen_attention, torch.bfloat16), (padded_attention, torch.float32)):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in attention_inputs(kv_heads)]
        output = kernel(*inputs, layout, 0.125)
        gradients = torch.autograd.grad(output.float().square().sum(), inputs)
        results.append([tensor.float() for tensor in (output, *gradients)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)


def test_policy_on_cuda_agrees_with_cpu_and_learns(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    config = LearnerConfig(lr=1e-3)
    policies = {
        device: Policy.load(folder, revision=None, config=config, temperature=0.9, device=torch.device(device))
        for device in ("cpu", "cuda")
    }
    batch = micro_batch((9, 30, 12))
    on_cpu, on_gpu = (policy.logprobs(batch.to(policy.device)).cpu() for policy in policies.values())
    assert (on_cpu - on_gpu).abs().mean() < 0.02
    gpu = policies["cuda"]
    for _ in range(5):
        gpu.backward(batch.to(gpu.device), lambda logprobs_T: -logprobs_T.sum() / 40)
        gpu.step()
    assert gpu.logprobs(batch.to(gpu.device)).sum().cpu() > on_gpu.sum()


def test_a_gpu_of_ampere_or_newer_takes_a_varlen_kernel() -> None:
    assert select_attention(torch.device("cuda")) in ("lambdapo_packed", "lambdapo_varlen")


def test_the_layout_needs_no_index_tensors_on_the_varlen_path() -> None:
    batch = micro_batch(LENGTHS)
    layout = layout_of(batch.to(torch.device("cuda")))
    varlen_attention(*attention_inputs(8), layout, 0.125)
    assert "padded" not in vars(layout)
