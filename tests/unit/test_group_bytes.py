"""What a lease reserves is never less than what its answer needs."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lambdapo_async.config import RunConfig
from lambdapo_async.config.sections import ArithmeticTask, ModelConfig, RolloutConfig, SamplingConfig
from lambdapo_async.group_bytes import largest_group
from lambdapo_async.rollout import Lease, Rollout, RolloutGroup, Timing, VersionSpan
from lambdapo_async.wire import MAX_REWARD_PARTS, encode_group


@settings(deadline=None, max_examples=50)
@given(
    group_size=st.integers(2, 40), max_tokens=st.integers(1, 200), prompt=st.integers(1, 300), parts=st.integers(1, 64)
)
def test_no_group_is_larger_than_reserved(group_size: int, max_tokens: int, prompt: int, parts: int) -> None:
    config = RunConfig(
        model=ModelConfig(path="some/model", max_length=prompt + max_tokens),
        task=ArithmeticTask(),
        sampling=SamplingConfig(max_tokens=max_tokens),
        rollout=RolloutConfig(group_size=group_size),
    )
    assert parts <= MAX_REWARD_PARTS
    # Every rollout as long as allowed, every token of another version, every name long.
    rollout = Rollout(
        completion_ids=np.full(max_tokens, 2**31 - 1, np.int32),
        behavior_logprobs=np.full(max_tokens, -1.0, np.float32),
        version_spans=tuple(VersionSpan(2**62 + i, 1) for i in range(max_tokens)),
        finish_reason="length",
        text="a" * (8 * max_tokens),
        reward=1.0,
        reward_parts={f"{number:03d}" + "n" * 90: 1.0 for number in range(parts)},
    )
    group = RolloutGroup(
        lease=Lease("train", 2**53),
        prompt_ids=np.ones(prompt, np.int32),
        rollouts=(rollout,) * group_size,
        actor_id="h" * 128,
        timing=Timing(started_at=1.0, generation_s=1.0, scoring_s=1.0),
    )
    assert len(encode_group(group)) <= largest_group(config)
