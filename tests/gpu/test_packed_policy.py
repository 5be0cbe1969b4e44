"""The policy on a GPU of Ampere or newer against the policy on the CPU."""

from pathlib import Path

import pytest
import torch

from lambdapo_async.config.learner import LearnerConfig
from learner.policy import Policy
from learner.reference_policy import ReferencePolicy
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


def test_policy_and_reference_begin_as_the_same_function(tmp_path: Path) -> None:
    folder, cuda = tiny_model_folder(tmp_path), torch.device("cuda")
    policy = Policy.load(folder, revision=None, config=LearnerConfig(), temperature=0.9, device=cuda)
    reference = ReferencePolicy.load(folder, revision=None, temperature=0.9, device=cuda)
    batch = micro_batch((9, 30, 12)).to(cuda)
    torch.testing.assert_close(policy.logprobs(batch), reference.logprobs(batch), rtol=0, atol=0)


def test_masters_are_float32_and_published_as_the_weights_that_compute(tmp_path: Path) -> None:
    folder, cuda = tiny_model_folder(tmp_path / "model"), torch.device("cuda")
    policy = Policy.load(folder, revision=None, config=LearnerConfig(lr=1e-3), temperature=0.9, device=cuda)
    batch = micro_batch((9, 30, 12)).to(cuda)
    for _ in range(3):
        policy.backward(batch, lambda logprobs_T, _: -logprobs_T.sum() / 40)
        policy.step()
    assert {tensor.dtype for _, tensor in policy.named_masters()} == {torch.float32}
    policy.save_model(tmp_path / "saved")
    reference = ReferencePolicy.load(tmp_path / "saved", revision=None, temperature=0.9, device=cuda)
    torch.testing.assert_close(policy.logprobs(batch), reference.logprobs(batch), rtol=0, atol=0)
