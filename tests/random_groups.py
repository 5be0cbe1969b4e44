"""Rollout groups drawn from seeds alone: the same on every machine, for runs that are compared to the bit."""

import numpy as np

from lambdapo_async.broker.interface import Descriptor
from lambdapo_async.config import RunConfig
from lambdapo_async.objective.advantage import group_confidence
from lambdapo_async.rollout import Lease, Rollout, RolloutGroup, Timing, VersionSpan
from learner.arrivals import ReceivedGroup

_PROMPT_TOKENS = (4, 20)


def random_group(index: int, config: RunConfig, *, vocab: int, version: int = 0) -> RolloutGroup:
    """Training group ``index``: random tokens, log mu near that of a uniform choice, rewards that are not all equal."""
    rng = np.random.Generator(np.random.PCG64([config.seed, index]))
    low, high = _PROMPT_TOKENS
    rollouts = []
    for number in range(config.rollout.group_size):
        length = int(rng.integers(2, config.sampling.max_tokens + 1))
        reward = float(number % 2 if number < 2 else rng.integers(0, 2))
        rollouts.append(
            Rollout(
                completion_ids=rng.integers(0, vocab, length),
                behavior_logprobs=-np.log(vocab) + 0.4 * (rng.random(length) - 0.5),
                version_spans=(VersionSpan(version, length),),
                finish_reason="stop",
                text="",
                reward=reward,
                reward_parts={"verifiable": reward},
            )
        )
    return RolloutGroup(
        lease=Lease("train", index),
        prompt_ids=rng.integers(0, vocab, int(rng.integers(low, high))),
        rollouts=tuple(rollouts),
        actor_id="a",
        timing=Timing(started_at=0.0, generation_s=0.0, scoring_s=0.0),
    )


def received_groups(step: int, config: RunConfig, *, vocab: int, version: int = 0) -> list[ReceivedGroup]:
    """The groups of one step, ``groups_per_step`` new ones, as the learner's ingest makes them."""
    first = step * config.rollout.groups_per_step
    received = []
    for index in range(first, first + config.rollout.groups_per_step):
        group = random_group(index, config, vocab=vocab, version=version)
        confidence_G, missing = group_confidence(
            [each.behavior_logprobs for each in group.rollouts], config.objective.advantage.confidence
        )
        received.append(
            ReceivedGroup(Descriptor("p", index + 1, group.lease, version, 0, 0.0), group, confidence_G, missing)
        )
    return received
