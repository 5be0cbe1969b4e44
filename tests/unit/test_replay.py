"""The replay queue: a plain stream, its bounds, and how it samples."""

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lambdapo_async.replay.bias import GroupShape
from lambdapo_async.replay.limits import ReplayError, ReplayLimits
from lambdapo_async.replay.priority import log_weights, weighted_order
from lambdapo_async.replay.queue import Drop, ReplayQueue, ReplaySnapshot
from tests.reference.replay import order_probability
from tests.replay_entries import any_limits, entry, make_limits, numbers

# A plain stream


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.lists(st.floats(0.0, 10.0), max_size=30), st.integers(0, 3))
def test_one_use_is_a_plain_stream_in_order_of_arrival(groups: int, masses: list[float], seed: int) -> None:
    queue = ReplayQueue[str](make_limits(groups=groups, half_life=1.0, seed=seed))
    batches = []
    for number, mass in enumerate(masses, 1):
        assert queue.offer(entry(number, version=number % 3, mass=mass))
        if queue.can_sample():
            batches.append(numbers(queue.sample()))
    arrivals = range(1, len(masses) + 1)
    assert batches == [list(arrivals[i : i + groups]) for i in range(0, len(masses) - groups + 1, groups)]
    assert queue.consumed == sum(map(len, batches))
    assert queue.num_groups == len(masses) % groups


def test_a_full_stream_makes_the_next_group_wait() -> None:
    queue = ReplayQueue[str](make_limits(groups=2, max_groups=3))
    assert [queue.offer(entry(number)) for number in (1, 2, 3, 4)] == [True, True, True, False]
    assert numbers(queue.sample()) == [1, 2]
    assert queue.offer(entry(4))
    assert numbers(queue.sample()) == [3, 4]
    assert queue.dropped == {"exhausted": 4}


# Bounds


def test_what_is_too_old_is_dropped_and_counted() -> None:
    queue = ReplayQueue[str](make_limits(drop_above=2))
    queue.advance(5)
    assert queue.offer(entry(1, version=2))
    assert queue.offer(entry(2, version=3))
    assert queue.offer(entry(3, version=4))
    assert queue.num_groups == 2
    queue.advance(6)
    assert not queue.can_sample()
    assert queue.missing_inserts() == 1
    shape = GroupShape(10, 0.5)
    assert queue.take_drops() == [Drop(1, "stale", 0, shape), Drop(2, "stale", 0, shape)]
    assert queue.take_drops() == []
    assert queue.consumed == 2
    with pytest.raises(ReplayError, match="version 5 follows 6"):
        queue.advance(5)


def test_a_group_that_can_never_fit_is_dropped() -> None:
    queue = ReplayQueue[str](make_limits(max_bytes=10))
    assert queue.offer(entry(1, num_bytes=11))
    assert (queue.dropped, queue.num_bytes, queue.consumed) == ({"too_large": 1}, 0, 1)
    assert queue.offer(entry(2, num_bytes=10))
    assert queue.num_bytes == 10


def test_the_ratio_holds_both_sides() -> None:
    queue = ReplayQueue[str](make_limits(groups=2, min_size=3, ratio=1.0, buffer=2.0, max_uses=3))
    for number, missing in ((1, 2), (2, 1), (3, 0)):
        assert queue.offer(entry(number))
        assert (queue.missing_inserts(), queue.can_sample()) == (missing, missing == 0)
    assert [queue.offer(entry(number)) for number in (4, 5, 6)] == [True, True, False]
    assert len(queue.sample()) == 2
    assert [queue.offer(entry(number)) for number in (6, 7, 8)] == [True, True, False]


def test_the_most_used_then_the_oldest_make_room_and_unused_ones_never() -> None:
    queue = ReplayQueue[str](make_limits(groups=2, max_uses=5, max_groups=4))
    for number, version in ((1, 3), (2, 1), (3, 2), (4, 0)):
        assert queue.offer(entry(number, version=version))
    queue.take([1, 2])
    queue.take([2, 3])
    for number, victim, uses in ((5, 2, 2), (6, 3, 1), (7, 1, 1)):
        assert queue.offer(entry(number))
        assert queue.take_drops() == [Drop(victim, "evicted", uses, GroupShape(10, 0.5))]
    assert not queue.offer(entry(8))
    assert queue.can_sample()


def test_nothing_is_evicted_when_that_would_not_make_enough_room() -> None:
    queue = ReplayQueue[str](make_limits(groups=1, max_uses=3, max_bytes=10))
    assert queue.offer(entry(1, num_bytes=2))
    assert queue.offer(entry(2, num_bytes=7))
    queue.take([1])
    assert not queue.offer(entry(3, num_bytes=6))
    assert (queue.num_groups, queue.dropped) == (2, {})


def test_a_full_queue_overrules_the_ratio() -> None:
    """Bytes ran out before the ratio was reached: someone must go on."""
    queue = ReplayQueue[str](make_limits(groups=2, ratio=1.0, buffer=2.0, max_uses=3, max_bytes=12))
    for number in (1, 2):
        assert queue.offer(entry(number, num_bytes=2))
    assert numbers(sorted(queue.sample(), key=lambda taken: taken.number)) == [1, 2]
    assert not queue.can_sample()
    assert queue.offer(entry(3, num_bytes=10))  # room for it only without one of the used ones
    assert not queue.can_sample()
    assert not queue.offer(entry(4, num_bytes=11))
    assert (queue.can_sample(), queue.missing_inserts()) == (True, 0)


def test_too_few_bytes_for_a_step_is_an_error_and_no_wait() -> None:
    queue = ReplayQueue[str](make_limits(groups=3, max_bytes=10))
    queue.offer(entry(1, num_bytes=4))
    queue.offer(entry(2, num_bytes=4))
    with pytest.raises(ReplayError, match=r"max_bytes = 10 is full with 2 groups .8 bytes., a step needs 3"):
        queue.offer(entry(3, num_bytes=4))


def test_misuse_is_an_error() -> None:
    queue = ReplayQueue[str](make_limits(max_uses=2))
    with pytest.raises(ReplayError, match="holds 0 groups and 2 more"):
        queue.sample()
    queue.offer(entry(3))
    with pytest.raises(ReplayError, match="record 3 is offered after 3"):
        queue.offer(entry(3))
    for chosen in ([3, 3], [3, 4]):
        with pytest.raises(ReplayError, match="journal's step took"):
            queue.take(chosen)


@settings(max_examples=50, deadline=None)
@given(any_limits(), st.data())
def test_invariants_hold_whatever_comes(limits: ReplayLimits, data: st.DataObject) -> None:
    """No deadlock, no group twice in a batch, never too often, never too much, and every group accounted for."""
    queue = ReplayQueue[str](limits)
    uses: Counter[int] = Counter()
    drops: list[Drop] = []
    version, dealt_with, pending = 0, 0, None
    for number in range(1, data.draw(st.integers(0, 40), label="arrivals") + 1):
        pending = entry(
            number,
            version=max(0, version - data.draw(st.integers(0, 3))),
            num_bytes=data.draw(st.integers(1, 10)),
            mass=data.draw(st.sampled_from([0.0, 0.5, 3.0])),
        )
        while True:
            accepted = queue.offer(pending)
            assert queue.num_bytes <= limits.max_bytes
            assert queue.num_groups <= limits.max_groups
            assert accepted or queue.can_sample()
            dealt_with += accepted
            if not accepted or (queue.can_sample() and data.draw(st.booleans(), label="step")):
                batch = numbers(queue.sample())
                assert len(set(batch)) == len(batch) == limits.rate.groups_per_sample
                uses.update(batch)
                if data.draw(st.booleans(), label="published"):
                    version += 1
                    queue.advance(version)
            if accepted:
                break
        drops += queue.take_drops()
    assert all(count <= limits.max_uses for count in uses.values())
    assert queue.num_groups + len(drops) == dealt_with
    assert len({drop.number for drop in drops}) == len(drops)
    assert all(drop.uses == uses[drop.number] for drop in drops)
    assert all(drop.uses == limits.max_uses for drop in drops if drop.reason == "exhausted")
    assert all(drop.uses > 0 for drop in drops if drop.reason == "evicted")
    unused = sum(count == 0 for count in queue.snapshot().uses.values())
    if limits.max_uses == 1:
        assert queue.consumed == dealt_with - unused
    else:
        assert queue.consumed == dealt_with


# Sampling


def test_weights_decay_with_age_and_follow_the_mass() -> None:
    weights = np.exp(log_weights(np.array([1.0, 1.0, 3.0, 0.0]), np.array([0, 4, 2, 0]), half_life=2.0))
    np.testing.assert_allclose(weights, [1.0, 0.25, 1.5, 0.0])


def test_order_follows_the_definition_of_drawing_without_replacement() -> None:
    weights = [Fraction(1), Fraction(2), Fraction(5)]
    rng = np.random.default_rng(1)
    num_draws = 20_000
    log_weight_B = np.log(np.array([float(weight) for weight in weights]))
    seen = Counter(tuple(weighted_order(log_weight_B, rng).tolist()) for _ in range(num_draws))
    for order in itertools.permutations(range(3)):
        expected = float(order_probability(weights, order))
        tolerance = 4 * math.sqrt(expected * (1 - expected) / num_draws)
        assert seen[order] / num_draws == pytest.approx(expected, abs=tolerance)


def test_what_weighs_nothing_comes_last_in_order() -> None:
    log_weight_B = log_weights(np.array([0.0, 1e-300, 0.0, 1.0]), np.array([0, 10**6, 0, 0]), half_life=1.0)
    assert weighted_order(log_weight_B, np.random.default_rng(0)).tolist() == [3, 1, 0, 2]
    assert weighted_order(np.full(100, -np.inf), np.random.default_rng(0)).tolist() == list(range(100))


def test_seed_and_number_of_draws_are_the_whole_random_state() -> None:
    def batches(queue: ReplayQueue[str], count: int) -> list[list[int]]:
        return [numbers(queue.sample()) for _ in range(count)]

    limits = make_limits(groups=3, max_uses=50, seed=7)
    entries = [entry(number) for number in range(1, 21)]
    queue = ReplayQueue[str](limits)
    for each in entries:
        queue.offer(each)
    first = batches(queue, 3)
    snapshot = ReplaySnapshot.model_validate_json(queue.snapshot().model_dump_json())
    rest = batches(queue, 5)
    assert len(set(map(tuple, rest))) > 1
    assert batches(ReplayQueue(limits, snapshot, reversed(entries)), 5) == rest
    redone = ReplayQueue[str](limits)
    for each in entries:
        redone.offer(each)
    for batch in first:
        redone.take(batch)
    assert redone.snapshot() == snapshot
    assert batches(redone, 5) == rest
    other = ReplayQueue(make_limits(groups=3, max_uses=50, seed=8), snapshot, entries)
    assert batches(other, 5) != rest


def test_with_reuse_what_is_fresh_is_drawn_first() -> None:
    queue = ReplayQueue[str](make_limits(groups=3, max_uses=2, half_life=0.01))
    for number in range(1, 11):
        assert queue.offer(entry(number, version=number))
    queue.advance(10)
    assert numbers(queue.sample()) == [10, 9, 8]


def test_a_snapshot_brings_back_all_that_the_queue_counts() -> None:
    limits = make_limits(groups=1, max_uses=2, drop_above=3)
    queue = ReplayQueue[str](limits)
    assert queue.oldest_number() == 1
    queue.advance(5)
    for number, version in ((1, 1), (2, 5), (3, 4)):
        assert queue.offer(entry(number, version=version))
    queue.take([2])
    queue.take([2])
    restored = ReplayQueue[str](limits, queue.snapshot(), [entry(3, version=4)])
    assert (restored.consumed, restored.dropped) == (3, {"stale": 1, "exhausted": 1})
    assert (restored.num_groups, restored.num_bytes, restored.oldest_number()) == (1, 1, 3)
    with pytest.raises(ReplayError, match="version 4 follows 5"):
        restored.advance(4)
    with pytest.raises(ReplayError, match="record 3 is offered after 3"):
        restored.offer(entry(3))
    restored.take([3])
    restored.take([3])
    assert restored.oldest_number() == 4, "of what comes next"


def test_a_member_the_journal_lost_is_an_error() -> None:
    snapshot = ReplaySnapshot(uses={4: 0, 6: 1}, last_number=6)
    with pytest.raises(ReplayError, match=r"1 of 2 groups .*record 6 is the first"):
        ReplayQueue[str](make_limits(), snapshot, [entry(4), entry(5)])
