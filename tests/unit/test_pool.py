"""The pool's bookkeeping: what a step is told of the groups that came, and of those that went."""

import math

import pytest

from lambdapo_async.broker.interface import Descriptor
from lambdapo_async.config import RunConfig
from lambdapo_async.journal.records import GroupRecord
from lambdapo_async.rollout import RolloutGroup
from lambdapo_async.wire import encode_group
from learner.arrivals import Arrival, Screen
from learner.pool import Pool
from tests.groups import VOCAB_SIZE, make_group

CONFIG = RunConfig.model_validate(
    {
        "model": {"path": "starter"},
        "task": {"kind": "arithmetic"},
        "rollout": {"group_size": 2, "groups_per_step": 2},
        "staleness": {"max_staleness": 1, "drop_above": 3},
        "evaluation": {"every_steps": 5, "num_prompts": 2},
    }
)
SCREEN = Screen(CONFIG, vocab_size=VOCAB_SIZE)


def arrival(number: int, group: RolloutGroup, *, discarded: str = "") -> Arrival:
    payload = encode_group(group)
    descriptor = Descriptor("p", number, group.lease, group.min_version, len(payload), 0.5)
    return SCREEN.arrival(number, GroupRecord(descriptor, payload, discarded), group)


def test_a_step_is_told_that_a_long_and_hard_group_was_lost_to_staleness() -> None:
    """One waits in the queue until it is too old, one is too old when it comes, one has no signal."""
    pool = Pool(CONFIG, SCREEN)
    pool.advance(5)
    hard, easy = (0.0, 0.0), (0.0, 1.0)
    assert pool.offer(arrival(1, make_group(0, num_tokens=900, rewards=hard, version=2)))
    pool.advance(6)
    assert pool.offer(arrival(2, make_group(1, num_tokens=600, rewards=hard, version=1)))
    assert pool.offer(arrival(3, make_group(2, num_tokens=100, rewards=hard, version=6), discarded="zero_variance"))
    for number in (4, 5):
        assert pool.offer(arrival(number, make_group(number, num_tokens=100, rewards=easy, version=6)))
    record, batch = pool.sample(1, 6)
    assert record.chosen == (4, 5)
    assert batch.bias["bias/stale_upto_1024"] == 2
    assert batch.bias["bias/zero_variance_upto_128"] == 1
    assert batch.bias["bias/length_ratio"] == pytest.approx(100 / 360)
    assert batch.bias["bias/difficulty_gap"] == pytest.approx(0.5 - 0.8)
    assert batch.totals == {"stale": 2, "zero_variance": 1, "trained": 2}
    assert pool.state().bias.dropped == {"stale": {1024: 2}, "zero_variance": {128: 1}}


def test_a_pool_that_lost_nothing_is_not_biased() -> None:
    pool = Pool(CONFIG, SCREEN)
    pool.advance(1)
    for number, num_tokens in ((1, 900), (2, 100)):
        assert pool.offer(arrival(number, make_group(number, num_tokens=num_tokens, version=1)))
    bias = pool.sample(1, 1)[1].bias
    assert math.isclose(bias["bias/length_ratio"], 1.0)
    assert bias["bias/difficulty_gap"] == 0.0
    assert not [name for name in bias if "_upto_" in name]
