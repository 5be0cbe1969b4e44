"""The policy on a GPU of Ampere or newer against the policy on the CPU."""

from pathlib import Path

import pytest
import torch

from lambdapo_async.config.learner import LearnerConfig
from learner.policy import Policy
from tests.tiny_models import micro_batch, tiny_model_folder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


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
        gpu.backward(batch.to(gpu.device), lambda logprobs_T, _: -logprobs_T.sum() / 40)
        gpu.step()
    assert gpu.logprobs(batch.to(gpu.device)).sum().cpu() > on_gpu.sum()
