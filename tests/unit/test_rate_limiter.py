"""The rate limiter against Reverb's definition; that both sides really wait is in ``test_batcher_ratio``."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lambdapo_async.replay.rate_limiter import LimiterCounts, RateLimit, RateLimiter
from tests.reference.replay import SampleToInsertRatio


@st.composite
def limits(draw: st.DrawFn) -> RateLimit:
    """Ratios in quarters, so that floats are exact."""
    groups = draw(st.integers(1, 5))
    ratio = draw(st.integers(4, 16)) / 4
    return RateLimit(
        groups_per_sample=groups,
        min_size=groups + draw(st.integers(0, 5)),
        samples_per_insert=ratio,
        error_buffer=max(groups, ratio) + draw(st.integers(0, 12)) / 4,
    )


@settings(max_examples=60, deadline=None)
@given(
    limits(),
    st.integers(0, 30),
    st.integers(0, 60),
    st.integers(0, 12),
    st.lists(st.sampled_from(["insert", "sample", "delete"]), max_size=60),
)
def test_answers_as_reverb(limit: RateLimit, deletes: int, samples: int, size: int, wishes: list[str]) -> None:
    assert limit.samples_per_insert is not None
    ours = RateLimiter(limit, LimiterCounts(inserts=deletes + size, samples=samples, deletes=deletes))
    theirs = SampleToInsertRatio(Fraction(limit.samples_per_insert), limit.min_size, Fraction(limit.error_buffer))
    theirs.inserts, theirs.samples, theirs.deletes = deletes + size, samples, deletes
    for wish in wishes:
        assert ours.can_insert() == theirs.can_insert()
        assert ours.can_sample() == theirs.can_sample(limit.groups_per_sample)
        assert ours.can_insert() or ours.can_sample()
        if wish == "insert" and ours.can_insert():
            ours.inserted()
            theirs.inserts += 1
        elif wish == "sample" and ours.can_sample():
            ours.sampled()
            theirs.samples += limit.groups_per_sample
        elif wish == "delete" and ours.size > 0:
            ours.deleted()
            theirs.deletes += 1


@settings(max_examples=60, deadline=None)
@given(limits(), st.lists(st.booleans(), max_size=80))
def test_ratio_stays_in_its_band(limit: RateLimit, wants_insert: list[bool]) -> None:
    limiter = RateLimiter(limit)
    for insert in wants_insert:
        if insert and limiter.can_insert():
            limiter.inserted()
        elif not insert and limiter.can_sample():
            limiter.sampled()
        assert limiter.error <= limit.error_buffer
        assert limiter.error >= -limit.error_buffer or limiter.size < limit.min_size


@settings(max_examples=60, deadline=None)
@given(limits(), st.integers(0, 60), st.integers(0, 60))
def test_deltas_say_when_a_side_may_go_on(limit: RateLimit, inserts: int, samples: int) -> None:
    counts = LimiterCounts(inserts=inserts, samples=samples)
    waits = RateLimiter(limit, counts)
    for left in range(waits.missing_inserts(), 0, -1):
        assert waits.missing_inserts() == left
        assert not waits.can_sample()
        waits.inserted()
    assert waits.can_sample()
    owes = RateLimiter(limit, counts)
    missing = owes.missing_samples()
    assert RateLimiter(limit, LimiterCounts(inserts=inserts, samples=samples + missing)).can_insert()
    if missing:
        assert not RateLimiter(limit, LimiterCounts(inserts=inserts, samples=samples + missing - 1)).can_insert()


def test_a_third_of_an_insert_short_is_one_short() -> None:
    """The error would fall from 1.5 * (3 - 2) - 2 = -0.5 to -2.5, below the buffer of 2 by a third of an insert."""
    limit = RateLimit(groups_per_sample=2, min_size=2, samples_per_insert=1.5, error_buffer=2.0)
    limiter = RateLimiter(limit, LimiterCounts(inserts=3, samples=2))
    assert (limiter.error, limiter.missing_inserts(), limiter.can_sample()) == (-0.5, 1, False)
    limiter.inserted()
    assert (limiter.error, limiter.missing_inserts(), limiter.can_sample()) == (1.0, 0, True)


def test_without_a_ratio_only_the_size_counts() -> None:
    limiter = RateLimiter(RateLimit(groups_per_sample=2, min_size=3))
    assert limiter.error == 0.0
    limiter.inserted()
    limiter.inserted()
    assert not limiter.can_sample()
    assert limiter.missing_inserts() == 1
    limiter.inserted()
    for _ in range(50):
        assert limiter.can_sample()
        assert limiter.can_insert()
        limiter.sampled()


def test_below_the_minimum_size_inserts_are_free_again() -> None:
    limit = RateLimit(groups_per_sample=1, min_size=2, samples_per_insert=1.0, error_buffer=2.0)
    limiter = RateLimiter(limit, LimiterCounts(inserts=10, deletes=8))
    assert (limiter.error, limiter.can_insert()) == (8.0, False)
    limiter.deleted()
    assert limiter.can_insert()
    assert not limiter.can_sample()


def test_counts_restore_it() -> None:
    limiter = RateLimiter(RateLimit(groups_per_sample=1, min_size=1, samples_per_insert=2.0, error_buffer=2.0))
    for act in (limiter.inserted, limiter.inserted, limiter.sampled, limiter.deleted):
        act()
    assert limiter.counts() == LimiterCounts(inserts=2, samples=1, deletes=1)
    restored = RateLimiter(
        RateLimit(groups_per_sample=1, min_size=1, samples_per_insert=2.0, error_buffer=2.0),
        LimiterCounts.model_validate_json(limiter.counts().model_dump_json()),
    )
    assert (restored.size, restored.error) == (limiter.size, limiter.error) == (1, 1.0)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"groups_per_sample": 4, "min_size": 3}, "raise it"),
        ({"groups_per_sample": 0, "min_size": 0}, "holds no sample of 0 groups"),
        ({"groups_per_sample": 1, "min_size": 1, "samples_per_insert": 0.5, "error_buffer": 9.0}, "never be trained"),
        ({"groups_per_sample": 4, "min_size": 4, "samples_per_insert": 2.0, "error_buffer": 3.9}, "raise it to 4"),
        ({"groups_per_sample": 1, "min_size": 1, "samples_per_insert": 3.0, "error_buffer": 2.0}, "raise it to 3"),
        ({"groups_per_sample": 1, "min_size": 1, "samples_per_insert": 3.0, "error_buffer": float("nan")}, "raise it"),
    ],
)
def test_limits_that_would_lock_both_sides_are_refused(kwargs: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RateLimit(**kwargs)  # type: ignore[arg-type]
