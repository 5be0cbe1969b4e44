"""Rollout groups for tests: fixed ones and hypothesis strategies."""

import numpy as np
from hypothesis import strategies as st

from lambdapo_async.rollout import FINISH_REASONS, Lease, Rollout, RolloutGroup, Timing, VersionSpan

VOCAB_SIZE = 1000
MAX_VERSION = 100


def make_rollout(
    num_tokens: int = 5, *, reward: float = 1.0, version: int = 0, logprob: float = -0.5, text: str = "answer"
) -> Rollout:
    return Rollout(
        completion_ids=np.arange(num_tokens) % VOCAB_SIZE,
        behavior_logprobs=np.full(num_tokens, logprob),
        version_spans=(VersionSpan(version, num_tokens),) if num_tokens else (),
        finish_reason="stop",
        text=text,
        reward=reward,
        reward_parts={"verifiable": reward},
    )


def make_group(
    index: int = 0,
    *,
    rewards: tuple[float, ...] = (0.0, 1.0),
    version: int = 0,
    lease: Lease | None = None,
    num_tokens: int = 5,
    actor_id: str = "actor-a",
) -> RolloutGroup:
    return RolloutGroup(
        lease=lease or Lease("train", index),
        prompt_ids=np.array([1, 2, 3]),
        rollouts=tuple(make_rollout(num_tokens, reward=reward, version=version) for reward in rewards),
        actor_id=actor_id,
        timing=Timing(started_at=1.0, generation_s=0.5, scoring_s=0.25),
    )


_finite = st.floats(-1e6, 1e6, allow_nan=False)


@st.composite
def rollouts(draw: st.DrawFn) -> Rollout:
    spans = tuple(
        VersionSpan(draw(st.integers(0, MAX_VERSION)), draw(st.integers(1, 6))) for _ in range(draw(st.integers(0, 4)))
    )
    length = sum(span.num_tokens for span in spans)
    return Rollout(
        completion_ids=np.array(
            draw(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=length, max_size=length)), np.int32
        ),
        behavior_logprobs=np.array(
            draw(st.lists(st.floats(-1e4, 0.0, width=32), min_size=length, max_size=length)), np.float32
        ),
        version_spans=spans,
        finish_reason=draw(st.sampled_from(FINISH_REASONS)),
        text=draw(st.text(max_size=20)),
        reward=draw(_finite),
        reward_parts=draw(st.dictionaries(st.text(max_size=8), _finite, max_size=3)),
    )


@st.composite
def groups(draw: st.DrawFn) -> RolloutGroup:
    return RolloutGroup(
        lease=Lease(
            draw(st.sampled_from(["train", "heldout"])),
            draw(st.integers(0, 2**40)),
            draw(st.integers(0, 2**31)),
        ),
        prompt_ids=np.array(draw(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=8)), np.int32),
        rollouts=tuple(draw(st.lists(rollouts(), min_size=1, max_size=5))),
        actor_id=draw(st.text(max_size=20)),
        timing=Timing(started_at=draw(_finite), generation_s=draw(_finite), scoring_s=draw(_finite)),
    )
