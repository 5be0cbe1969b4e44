"""Who is set aside, and what is known of each actor."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lambdapo_async import fleet_health
from lambdapo_async.fleet_health import (
    MAX_ACTORS,
    MIN_FRESH_TOKENS,
    MISMATCH_FACTOR,
    MISMATCH_FLOOR,
    FleetHealth,
    FreshTokens,
    mismatch_metrics,
    outliers,
)

NAMES = st.text("abcdefgh", min_size=1, max_size=3)
FLEETS = st.dictionaries(NAMES, st.floats(0.0, 5.0), max_size=12)


def add(health: FleetHealth, actor_id: str, *, k3: float = 0.0, tokens: int = 100, cut: int = 0) -> None:
    """A group that was received and trained."""
    health.received(actor_id, num_rollouts=8, num_truncated=cut)
    health.trained(actor_id, FreshTokens(tokens, k3 * tokens, 0.0))


@given(FLEETS)
def test_most_of_a_fleet_is_never_set_aside(mismatch: dict[str, float]) -> None:
    found = outliers(mismatch)
    assert 2 * len(found) <= len(mismatch)
    assert all(mismatch[actor] > MISMATCH_FLOOR for actor in found)
    assert found == outliers(dict(reversed(mismatch.items()))), "the order of the actors does not matter"


@given(st.dictionaries(NAMES, st.floats(0.5, 1.5), min_size=1, max_size=12), st.floats(1e-4, 1.0))
def test_actors_that_are_alike_stay_whatever_their_kernels_do(fleet: dict[str, float], scale: float) -> None:
    assert outliers({actor: scale * value for actor, value in fleet.items()}) == []


@given(st.dictionaries(NAMES, st.floats(0.0, 0.005), min_size=1, max_size=12), st.floats(0.06, 100.0))
def test_one_that_is_off_is_found_among_any_number(fleet: dict[str, float], value: float) -> None:
    assert outliers({**fleet, "the odd one": value}) == ["the odd one"]


def test_worked_examples() -> None:
    assert outliers({}) == outliers({"a": 9.0}) == []
    assert outliers({"a": 0.001, "b": 0.021}) == ["b"]
    assert outliers({"a": 0.001, "b": MISMATCH_FLOOR}) == []
    assert outliers({"a": 0.01, "b": 0.09, "c": 0.01}) == []
    assert outliers({"a": 0.01, "b": MISMATCH_FACTOR * 0.01 + 1e-6, "c": 0.01}) == ["b"]
    assert outliers({"a": 1.0, "b": 1.0, "c": 1.0, "d": 0.001}) == [], "three of four: the learner may be wrong"
    assert outliers({"a": 0.001, "b": math.nan, "c": 0.001}) == ["b"]
    assert outliers({"a": 0.1, "b": math.nan, "c": 0.1}) == ["b"], "NaN is no part of what others are held against"
    assert outliers({"a": math.nan, "b": math.nan, "c": 0.01}) == [], "two of three"
    assert outliers({"a": math.nan, "b": math.nan, "c": 0.01, "d": 0.01}) == ["a", "b"]


def test_nobody_is_judged_from_a_few_tokens() -> None:
    health = FleetHealth()
    for _ in range(40):
        add(health, "good", k3=0.001)
    add(health, "bad", k3=1.0, tokens=MIN_FRESH_TOKENS - 1)
    assert health.outliers() == []
    add(health, "bad", k3=1.0, tokens=100)
    assert health.outliers() == ["bad"]
    add(health, "new", k3=1.0, tokens=MIN_FRESH_TOKENS)
    add(health, "fair", k3=0.001, tokens=MIN_FRESH_TOKENS)
    assert health.outliers() == ["bad", "new"]
    for actor in ("bad", "new", "never seen"):
        health.forget(actor)
    assert health.outliers() == []


def test_who_generates_more_is_not_more_off() -> None:
    health = FleetHealth()
    for tokens, actor in ((1000, "slow"), (1000, "slower"), (100_000, "fast")):
        add(health, actor, k3=0.05, tokens=tokens)
    assert health.outliers() == []


def test_what_is_known_of_an_actor() -> None:
    health = FleetHealth()
    add(health, "a", k3=0.5, cut=2)
    known = health.actors()["a"]
    assert (known.mismatch, known.acceptance, known.truncated) == (0.5, 1.0, 0.25)
    health.received("a", num_rollouts=8, num_truncated=0)
    assert health.actors()["a"].acceptance == 0.5
    health.trained("resumed", FreshTokens(1, 0.0, 0.0))
    assert health.actors()["resumed"].acceptance != 1.0, "nothing is known of what it sent"
    add(health, "stale", tokens=0)
    assert math.isnan(health.actors()["stale"].mismatch)


def test_an_actor_is_what_its_last_groups_were() -> None:
    health = FleetHealth()
    for k3 in [1.0] * 100 + [0.0] * 400:
        add(health, "a", k3=k3)
    assert health.actors()["a"].mismatch < 0.01


def test_memory_is_bounded_and_the_silent_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_ACTORS == 4096
    monkeypatch.setattr(fleet_health, "MAX_ACTORS", 2)
    health = FleetHealth()
    for actor in ("a", "b", "a", "c"):
        add(health, actor)
    assert sorted(health.actors()) == ["a", "c"]


def test_a_steps_mismatch_is_taken_over_the_fresh_tokens_of_all_groups() -> None:
    fresh = (FreshTokens(3, 9.0, 0.6), FreshTokens(0, 0.0, 0.0), FreshTokens(1, 9.0, 0.2))
    assert mismatch_metrics(fresh, num_tokens=16) == pytest.approx(
        {"mismatch/fresh": 0.2, "mismatch/fresh_share": 0.25}
    )
    assert mismatch_metrics(fresh[1:2], num_tokens=16) == {"mismatch/fresh_share": 0.0}
    assert mismatch_metrics(fresh[1:2], num_tokens=0) == {}
