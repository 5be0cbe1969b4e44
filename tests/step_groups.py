"""What one training step of three rollouts a group is given, and how it is configured."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lambdapo_async.broker.interface import Descriptor
from lambdapo_async.config import RunConfig
from lambdapo_async.objective.advantage import estimate_advantages, group_confidence
from lambdapo_async.rollout import Lease, Rollout, RolloutGroup, Timing, VersionSpan
from learner.arrivals import ReceivedGroup
from tests.tiny_models import VOCAB

REWARDS = ((0.0, 1.0, 0.5), (1.0, 0.0, 0.0))
LENGTHS = ((3, 7, 5), (6, 2, 4))

Scorer = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""prompt, completion -> [C] log pi."""


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


def preset(name: str, **sections: object) -> dict[str, object]:
    return {"policy_loss": {"preset": name}, **sections}


def groups_by(
    score: Scorer,
    *,
    noise: float = 0.0,
    versions: tuple[int, ...] = (0,),
    lengths: Sequence[tuple[int, ...]] = LENGTHS,
) -> list[ReceivedGroup]:
    """Random groups with log mu = log pi plus noise; a rollout's tokens come from ``versions`` in turn."""
    rng, received = np.random.default_rng(0), []
    for index, (rewards, tokens) in enumerate(zip(REWARDS, lengths, strict=True)):
        prompt = rng.integers(0, VOCAB, 4)
        rollouts = []
        for reward, length in zip(rewards, tokens, strict=False):
            completion = rng.integers(0, VOCAB, length)
            logprobs = score(prompt, completion) + noise * rng.standard_normal(length)
            rollouts.append(
                Rollout(
                    completion_ids=completion,
                    behavior_logprobs=np.minimum(logprobs, 0.0),
                    version_spans=tuple(VersionSpan(versions[i * len(versions) // length], 1) for i in range(length)),
                    finish_reason="stop",
                    text="",
                    reward=reward,
                    reward_parts={"verifiable": reward, "density": 0.1 * length},
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
        descriptor = Descriptor("p", index + 1, group.lease, versions[-1], 0, 0.0)
        received.append(ReceivedGroup(descriptor, group, confidence, missing))
    return received


def advantages_of(groups: list[ReceivedGroup], run: RunConfig) -> Tensor:
    rewards = torch.tensor(np.stack([received.group.rewards for received in groups]))
    confidence = torch.tensor(np.stack([received.confidence_G for received in groups]))
    return estimate_advantages(rewards, confidence, run.objective.advantage)


REGULARISED = {"kl": {"coefficient": 0.1}, "entropy_coefficient": 0.05}
