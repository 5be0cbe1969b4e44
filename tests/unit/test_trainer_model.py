"""One training step of a real model: against REINFORCE by transformers' own forward, a document at a time."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lambdapo_async.config import RunConfig
from learner.arrivals import ReceivedGroup
from learner.policy import Policy
from learner.trainer import Trainer
from tests.step_groups import REGULARISED, advantages_of, config, groups_by, preset
from tests.tiny_models import tiny_model_folder

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_model_folder(tmp_path / "model")


def policy_of(folder: Path, run: RunConfig) -> Policy:
    return Policy.load(folder, revision=None, config=run.learner, temperature=1.0, device=CPU)


def plain_model(folder: Path) -> PreTrainedModel:
    """The same weights behind transformers' own attention."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def document_logprobs(model: PreTrainedModel, prompt: np.ndarray, completion: np.ndarray) -> Tensor:
    """[C] log pi of one completion, by transformers' own forward on one document."""
    ids = torch.tensor(np.concatenate([prompt, completion]), dtype=torch.int64)
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    logprobs = torch.log_softmax(logits[:-1], dim=-1).gather(1, ids[1:, None])[:, 0]
    return logprobs[len(prompt) - 1 :]


def groups_of_model(folder: Path, *, offset: float = 0.0) -> list[ReceivedGroup]:
    model = plain_model(folder)

    def score(prompt: np.ndarray, completion: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return document_logprobs(model, prompt, completion).numpy() - offset

    return groups_by(score)


def reinforce_grad_norm(folder: Path, groups: list[ReceivedGroup], run: RunConfig) -> float:
    """Norm of d/dtheta of -sum(A log pi) / tokens, one document at a time."""
    tokens = sum(received.group.num_completion_tokens for received in groups)
    model = plain_model(folder)
    for received, row in zip(groups, advantages_of(groups, run), strict=True):
        for rollout, advantage in zip(received.group.rollouts, row, strict=True):
            logprobs = document_logprobs(model, received.group.prompt_ids, rollout.completion_ids)
            (-(float(advantage) * logprobs).sum() / tokens).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return float(torch.sqrt(sum((g**2).sum() for g in gradients)))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["ppo", "decoupled", "cispo"])
def test_on_policy_a_real_model_gets_reinforce(folder: Path, name: str) -> None:
    run = config(objective=preset(name))
    policy = policy_of(folder, run)
    groups = groups_of_model(folder)
    expected = reinforce_grad_norm(folder, groups, run)
    result = Trainer(policy, run).step(groups, version=0)
    assert result.metrics["optim/grad_norm"] == pytest.approx(expected, rel=1e-4)
    assert result.metrics["mismatch/fresh"] == pytest.approx(0.0, abs=1e-5)
    assert result.metrics["ratio/ess_token"] == pytest.approx(1.0, abs=1e-4)


def test_micro_batching_changes_nothing_for_a_real_model(folder: Path) -> None:
    results = []
    for tokens in (64, 20):
        run = config(
            model={"max_length": tokens},
            learner={"micro_batch_tokens": tokens},
            sampling={"max_tokens": 8},
            objective=REGULARISED,
        )
        policy, frozen = policy_of(folder, run), policy_of(tiny_model_folder(folder.parent / f"f{tokens}", seed=1), run)
        metrics = Trainer(policy, run, frozen.logprobs).step(groups_of_model(folder, offset=0.3), version=0).metrics
        results.append((metrics, {name: tensor.clone() for name, tensor in policy.named_masters()}))
    (metrics, weights), (split_metrics, split_weights) = results
    for name in metrics:
        assert split_metrics[name] == pytest.approx(metrics[name], rel=1e-3, abs=1e-5), name
    for name, tensor in weights.items():
        torch.testing.assert_close(split_weights[name], tensor, rtol=1e-4, atol=1e-5)


def test_minibatches_and_epochs_take_several_updates(folder: Path) -> None:
    run = config(learner={"minibatches": 2, "epochs": 2})
    policy = policy_of(folder, run)
    Trainer(policy, run).step(groups_of_model(folder), version=0)
    assert policy.num_updates == 4
