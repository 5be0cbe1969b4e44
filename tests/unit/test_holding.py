"""How many groups an actor holds: pure properties, then whole fleets on a simulated clock."""

import heapq
import math
import statistics
from collections import Counter
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.holding import FLOOR, HEADROOM, Holding, HoldLimits, Speed, groups_to_hold
from lambdapo_async.config import RunConfig
from lambdapo_async.rollout import Lease

LIMITS = HoldLimits(most=64, engine_groups=16, longest_s=900.0, versions=3)
SECONDS = st.floats(1e-3, 1e4)


@st.composite
def speeds(draw: st.DrawFn) -> Speed:
    group_s = draw(SECONDS)
    return Speed(
        held=draw(st.floats(0.5, 500.0)),
        group_s=group_s,
        sampling_s=group_s * draw(st.floats(0.01, 1.0)),
        fill=draw(st.floats(0.05, 1.0)),
    )


@st.composite
def hold_limits(draw: st.DrawFn) -> HoldLimits:
    return HoldLimits(
        most=draw(st.integers(1, 300)),
        engine_groups=draw(st.integers(1, 100)),
        longest_s=draw(SECONDS),
        versions=draw(st.integers(1, 8)),
    )


def test_limits_come_from_the_config() -> None:
    tree = {"model": {"path": "m"}, "task": {"kind": "arithmetic"}, "rollout": {"group_size": 6}}
    limits = HoldLimits.of(RunConfig.model_validate({**tree, "staleness": {"max_staleness": 0}}))
    assert limits == HoldLimits(most=64, engine_groups=22, longest_s=900.0, versions=1)
    reused = RunConfig.model_validate({**tree, "staleness": {"max_staleness": 1}, "replay": {"max_uses": 4}})
    assert HoldLimits.of(reused).versions == 8


@given(st.none() | speeds(), hold_limits(), SECONDS | st.just(math.inf))
def test_it_stays_between_the_floor_and_the_most(speed: Speed | None, limits: HoldLimits, version_s: float) -> None:
    assert FLOOR <= groups_to_hold(speed, limits, version_s=version_s) <= limits.most


@given(speeds(), hold_limits(), SECONDS, st.sampled_from([1.0, 2.0, 4.0, 8.0]))  # exact in floats
def test_a_slower_actor_never_holds_more_of_a_shared_gate(
    speed: Speed, limits: HoldLimits, version_s: float, factor: float
) -> None:
    slower = replace(speed, group_s=speed.group_s * factor, sampling_s=speed.sampling_s * factor)
    slow = groups_to_hold(slower, limits, version_s=version_s)
    assert slow <= groups_to_hold(speed, limits, version_s=version_s)


@given(speeds(), hold_limits(), SECONDS)
def test_what_is_held_is_answered_in_time(speed: Speed, limits: HoldLimits, version_s: float) -> None:
    held = groups_to_hold(speed, limits, version_s=version_s)
    groups_per_s = speed.held / speed.group_s
    in_time_s = min(limits.longest_s, HEADROOM * limits.versions * version_s)
    assert held == FLOOR or held / groups_per_s <= in_time_s * (1 + 1e-9)


@given(speeds(), hold_limits())
def test_an_engine_that_is_fast_enough_is_kept_full(speed: Speed, limits: HoldLimits) -> None:
    generous = replace(limits, longest_s=math.inf)
    held = groups_to_hold(speed, generous, version_s=math.inf)
    places_used = held * speed.sampling_s / speed.group_s * speed.fill
    assert held == limits.most or places_used >= limits.engine_groups * (1 - 1e-9)


def test_before_the_first_group_the_engine_is_filled_once() -> None:
    assert Holding(LIMITS).target(0.0) == 16
    assert Holding(replace(LIMITS, most=5)).target(0.0) == 5


def test_the_pace_of_versions_is_that_of_the_learner_now() -> None:
    holding = Holding(LIMITS)
    for index in range(40):
        now = 10.0 * index
        holding.leased(Lease("train", index), now)
        holding.sampled(Lease("train", index), [10, 10], sampling_s=10.0)
        holding.ended(Lease("train", index), now + 10.0, is_delivered=True)
    assert holding.target(400.0) == 17, "no version was ever seen"
    holding.saw_version(-1, 0.0)
    holding.saw_version(5, 400.0)
    holding.saw_version(7, 404.0)
    assert holding.target(404.0) == FLOOR, "2 s a version: nine seconds are less than one group takes"
    assert holding.target(450.0) > 10, "the learner has stopped: nothing becomes stale"


def test_a_group_that_was_not_delivered_says_nothing() -> None:
    holding = Holding(LIMITS)
    holding.leased(Lease("train", 0), 0.0)
    holding.sampled(Lease("train", 0), [1], sampling_s=800.0)
    holding.ended(Lease("train", 0), 1000.0, is_delivered=False)
    holding.leased(Lease("heldout", 0), 0.0)
    holding.sampled(Lease("heldout", 0), [1], sampling_s=800.0)
    holding.ended(Lease("heldout", 0), 1000.0, is_delivered=True)
    assert holding.target(1000.0) == 16


@dataclass
class Machine:
    """An engine that runs ``places`` groups side by side, each in ``group_s``; others wait in line."""

    group_s: float
    places: int = 4
    fixed: int | None = None
    """Groups held, without looking at the speed."""

    def __post_init__(self) -> None:
        self.holding = Holding(HoldLimits(most=64, engine_groups=self.places, longest_s=900.0, versions=VERSIONS))
        self.free_at = [0.0] * self.places
        self.held = 0
        self.idle_s = 0.0

    def room(self, now: float) -> int:
        return (self.fixed or self.holding.target(now)) - self.held

    def begin(self, lease: Lease, now: float) -> float:
        self.holding.leased(lease, now)
        self.held += 1
        place = min(range(self.places), key=lambda i: self.free_at[i])
        self.idle_s += max(0.0, now - self.free_at[place])
        self.free_at[place] = max(now, self.free_at[place]) + self.group_s
        self.holding.sampled(lease, [1], sampling_s=self.free_at[place] - now)
        return self.free_at[place]


GROUPS_PER_STEP, VERSIONS, STEPS = 16, 3, 120


def simulate(machines: list[Machine]) -> tuple[list[tuple[int, int]], float]:
    """Train ``STEPS`` steps as soon as their groups are there: (machine, staleness) of each group, and the seconds."""
    now, version, index, queued, trained = 0.0, 0, 0, 0, 0
    events: list[tuple[float, int, int, int]] = []
    ages: list[tuple[int, int]] = []
    admitted = 0
    while version < STEPS:
        for number, machine in enumerate(machines):
            machine.holding.saw_version(version, now)
            while machine.room(now) > 0 and admitted - trained < VERSIONS * GROUPS_PER_STEP:
                done_at = machine.begin(Lease("train", index), now)
                heapq.heappush(events, (done_at, index, number, version))
                index, admitted = index + 1, admitted + 1
        now, ended, number, begun_version = heapq.heappop(events)
        machines[number].held -= 1
        machines[number].holding.ended(Lease("train", ended), now, is_delivered=True)
        ages.append((number, version - begun_version))
        queued += 1
        if queued == GROUPS_PER_STEP:
            queued, trained, version = 0, trained + GROUPS_PER_STEP, version + 1
    return ages, now


@pytest.mark.parametrize("slowdown", [1.0, 5.0, 20.0, 100.0])
def test_a_slow_actor_sends_nothing_stale_and_a_fast_one_never_runs_dry(slowdown: float) -> None:
    fast = [Machine(1.0), Machine(1.0)]
    slow = Machine(slowdown)
    ages, seconds = simulate([slow, *fast])
    settled = ages[len(ages) // 4 :]
    by_slow = [age for number, age in settled if number == 0]
    one_at_a_time = math.ceil(slowdown / (GROUPS_PER_STEP / 8.0)) + 1
    assert max(by_slow, default=0) <= max(one_at_a_time, HEADROOM * VERSIONS + 2)
    for machine in fast:
        assert machine.idle_s / (machine.places * seconds) < 0.05
    counts = Counter(number for number, _ in settled)
    assert counts[0] <= 1.5 * counts[1] / slowdown + 2


def test_holding_a_fixed_number_is_what_makes_a_slow_actor_stale() -> None:
    """The simulation can fail: without the rule the slow actor's groups are several times as old."""
    adaptive, _ = simulate([Machine(20.0), Machine(1.0), Machine(1.0)])
    fixed, _ = simulate([Machine(20.0, fixed=16), Machine(1.0), Machine(1.0)])

    def oldest(ages: list[tuple[int, int]]) -> float:
        return statistics.fmean(sorted(age for number, age in ages[len(ages) // 4 :] if number == 0)[-8:])

    assert oldest(fixed) > 2 * oldest(adaptive)


def test_a_lone_actor_uses_the_whole_gate() -> None:
    machine = Machine(5.0, places=40)
    _, seconds = simulate([machine])
    fastest_s = STEPS * GROUPS_PER_STEP / 40 * 5.0
    assert seconds < 1.25 * fastest_s
