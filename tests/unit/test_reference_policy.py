from pathlib import Path

import pytest
import torch

from lambdapo_async.config.learner import LearnerConfig
from lambdapo_async.errors import ConfigError
from learner.policy import Policy
from learner.reference_policy import ReferencePolicy
from tests.tiny_models import micro_batch, tiny_model_folder

CPU = torch.device("cpu")
BATCH = micro_batch((9, 6))


def reference(path: Path) -> ReferencePolicy:
    return ReferencePolicy.load(path, revision=None, temperature=0.7, device=CPU)


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_it_is_the_policy_that_lies_in_the_folder(tmp_path: Path, lora: dict[str, int] | None) -> None:
    settings = LearnerConfig.model_validate({"lr": 1e-2, "lora": lora})
    folder = tiny_model_folder(tmp_path / "model")
    policy = Policy.load(folder, revision=None, config=settings, temperature=0.7, device=CPU)
    first = policy.logprobs(BATCH)
    for _ in range(2):  # an adapter's first update moves B alone, from 0
        policy.backward(BATCH, lambda logprobs_T, _: -logprobs_T.sum())
        policy.step()
    policy.save_model(tmp_path / "trained")
    torch.testing.assert_close(reference(folder).logprobs(BATCH), first)
    found = reference(tmp_path / "trained").logprobs(BATCH)
    torch.testing.assert_close(found, policy.logprobs(BATCH), rtol=1e-4, atol=1e-4)
    assert (found - first).abs().max() > 1e-2
    assert not found.requires_grad


def test_a_missing_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="is a folder without config"):
        reference(tmp_path / "empty")
