"""One training step against the slowest possible one: a document at a time, a token at a time."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lambdapo_async.broker.interface import Descriptor
from lambdapo_async.config import RunConfig
from lambdapo_async.objective.advantage import estimate_advantages, group_confidence
from lambdapo_async.rollout import Lease, Rollout, RolloutGroup, Timing, VersionSpan
from learner.ingest import ReceivedGroup
from learner.policy import Policy
from learner.trainer import Trainer
from tests.tiny_models import VOCAB, tiny_model_folder

CPU = torch.device("cpu")
REWARDS = ((0.0, 1.0, 0.5), (1.0, 0.0, 0.0))
LENGTHS = ((3, 7, 5), (6, 2, 4))


def config(**changes: object) -> RunConfig:
    tree: dict[str, object] = {
        "model": {"path": "unused", "max_length": 64},
        "task": {"kind": "arithmetic"},
        "sampling": {"max_tokens": 16},
        "rollout": {"group_size": 3, "groups_per_step": 2},
        "learner": {"lr": 1e-3, "max_grad_norm": 1e9, "micro_batch_tokens": 64},
    }
    for section, values in changes.items():
        tree[section] = {**tree.get(section, {}), **values}  # type: ignore[dict-item]
    return RunConfig.model_validate(tree)


def policy_of(folder: Path, run: RunConfig) -> Policy:
    return Policy.load(folder, revision=None, config=run.learner, temperature=1.0, device=CPU)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_model_folder(tmp_path / "model")


def plain_model(folder: Path) -> PreTrainedModel:
    """The same weights behind transformers' own attention."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def document_logprobs(model: PreTrainedModel, prompt: np.ndarray, completion: np.ndarray) -> Tensor:
    """[C] log pi of one completion, by transformers' own forward on one document."""
    ids = torch.tensor(np.concatenate([prompt, completion]), dtype=torch.int64)
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    logprobs = torch.log_softmax(logits[:-1], dim=-1).gather(1, ids[1:, None])[:, 0]
    return logprobs[len(prompt) - 1 :]


def groups_for(folder: Path, *, offset: float = 0.0, version: int = 0) -> list[ReceivedGroup]:
    """Random groups whose behavior log-probabilities are the policy's own, minus ``offset``."""
    rng, model = np.random.default_rng(0), plain_model(folder)
    received = []
    for index, (rewards, lengths) in enumerate(zip(REWARDS, LENGTHS, strict=True)):
        prompt = rng.integers(0, VOCAB, 4)
        rollouts = []
        for reward, length in zip(rewards, lengths, strict=True):
            completion = rng.integers(0, VOCAB, length)
            with torch.no_grad():
                logprobs = document_logprobs(model, prompt, completion).numpy() - offset
            rollouts.append(
                Rollout(
                    completion_ids=completion,
                    behavior_logprobs=np.minimum(logprobs, 0.0),
                    version_spans=(VersionSpan(version, length),),
                    finish_reason="stop",
                    text="",
                    reward=reward,
                    reward_parts={"verifiable": reward},
                )
            )
        group = RolloutGroup(
            lease=Lease("train", index),
            prompt_ids=prompt,
            rollouts=tuple(rollouts),
            actor_id="a",
            timing=Timing(started_at=0.0, generation_s=0.0, scoring_s=0.0),
        )
        confidence, missing = group_confidence([r.behavior_logprobs for r in group.rollouts], kind="z")
        descriptor = Descriptor("p", index + 1, group.lease, version, 0, 0.0)
        received.append(ReceivedGroup(descriptor, group, confidence, missing))
    return received


def reinforce_grad_norm(folder: Path, groups: list[ReceivedGroup], run: RunConfig) -> float:
    """Norm of d/dtheta of -sum(A log pi) / tokens, one document at a time."""
    rewards = torch.tensor(np.stack([received.group.rewards for received in groups]))
    confidence = torch.tensor(np.stack([received.confidence_G for received in groups]))
    advantages = estimate_advantages(rewards, confidence, run.objective.advantage)
    tokens = sum(received.group.num_completion_tokens for received in groups)
    model = plain_model(folder)
    for received, row in zip(groups, advantages, strict=True):
        for rollout, advantage in zip(received.group.rollouts, row, strict=True):
            logprobs = document_logprobs(model, received.group.prompt_ids, rollout.completion_ids)
            (-(float(advantage) * logprobs).sum() / tokens).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return float(torch.sqrt(sum((g**2).sum() for g in gradients)))  # type: ignore[arg-type]


@pytest.mark.parametrize("preset", ["ppo", "decoupled", "cispo"])
def test_on_policy_every_preset_is_reinforce(folder: Path, preset: str) -> None:
    run = config(objective={"policy_loss": {"preset": preset}})
    policy = policy_of(folder, run)
    groups = groups_for(folder)
    expected = reinforce_grad_norm(folder, groups, run)
    result = Trainer(policy, run).step(groups, version=0)
    assert result.metrics["optim/grad_norm"] == pytest.approx(expected, rel=1e-4)
    assert result.metrics["mismatch/fresh"] == pytest.approx(0.0, abs=1e-5)
    assert result.metrics["ratio/ess_token"] == pytest.approx(1.0, abs=1e-4)


def test_micro_batching_changes_nothing(folder: Path) -> None:
    whole, split = (
        config(),
        config(model={"max_length": 20}, learner={"micro_batch_tokens": 20}, sampling={"max_tokens": 8}),
    )
    results = []
    for run in (whole, split):
        policy = policy_of(folder, run)
        metrics = Trainer(policy, run).step(groups_for(folder, offset=0.3), version=0).metrics
        results.append((metrics, dict(policy.named_masters())))
    (metrics, weights), (split_metrics, split_weights) = results
    for name in metrics:
        assert split_metrics[name] == pytest.approx(metrics[name], rel=1e-3, abs=1e-5), name
    for name, tensor in weights.items():
        torch.testing.assert_close(split_weights[name], tensor, rtol=1e-4, atol=1e-5)


def test_minibatches_take_several_updates_with_one_anchor(folder: Path) -> None:
    run = config(learner={"minibatches": 2}, objective={"policy_loss": {"preset": "decoupled"}})
    policy = policy_of(folder, run)
    groups = groups_for(folder)
    Trainer(policy, run).step(groups, version=0)
    assert policy.num_updates == 2


def test_mismatch_counts_only_tokens_of_the_newest_version(folder: Path) -> None:
    run = config()
    policy = policy_of(folder, run)
    stale = Trainer(policy, run).step(groups_for(folder, offset=0.3, version=1), version=2)
    assert stale.metrics["ratio/abs_log_mean"] == pytest.approx(0.3, abs=1e-3)
    assert "mismatch/fresh" not in stale.metrics
    fresh = Trainer(policy_of(folder, run), run).step(groups_for(folder, offset=0.3, version=2), version=2)
    assert fresh.metrics["mismatch/fresh"] == pytest.approx(0.3, abs=1e-3)
