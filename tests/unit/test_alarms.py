"""Alarms: what sounds, when it begins and when it ends."""

import pytest

from lambdapo_async.metrics import METRICS
from lambdapo_async.objective.alarms import NAMES, TREND_STEPS, Alarms


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({}, {}),
        ({"ratio/ess_token": 0.3, "ratio/ess_sequence": 0.9}, {}),
        ({"ratio/ess_token": 0.29}, {"ess_token": "ratio/ess_token = 0.29 is below 0.3"}),
        (
            {"ratio/ess_sequence": 0.1, "ratio/ess_token": 0.1},
            {"ess_token": "ratio/ess_token = 0.10", "ess_sequence": "ratio/ess_sequence = 0.10"},
        ),
        ({"ratio/masked_pos": 0.05, "ratio/rejected_neg": 0.04}, {}),
        (
            {"ratio/masked_pos": 0.05, "ratio/rejected_neg": 0.06},
            {"masked": "ratio/masked = 11% of the tokens are masked or rejected"},
        ),
        ({"ratio/masked_pos": 0.1}, {}),
        ({"ratio/truncated_pos": 0.5, "ratio/clipped_neg": 0.5}, {}),
        ({"reward/density": 0.5}, {}),
        ({"reward/verifiable": 0.5}, {}),
        ({"advantage/shift": -0.1}, {}),
        ({"advantage/shift": -0.1, "staleness/max": 0.0}, {}),
        ({"advantage/shift": -1e-17, "staleness/max": 3.0}, {}),
        (
            {"advantage/shift": -0.1, "staleness/max": 1.0},
            {"negative_shift": "advantage/shift = -0.100 is negative on stale data"},
        ),
    ],
)
def test_what_sounds(metrics: dict[str, float], expected: dict[str, str]) -> None:
    active = Alarms().check(metrics).active
    assert active.keys() == expected.keys()
    assert all(active[name].startswith(start) for name, start in expected.items())


def test_an_alarm_is_raised_when_it_begins_and_not_while_it_lasts() -> None:
    alarms = Alarms()
    steps = [alarms.check({"ratio/ess_token": ess}) for ess in (0.9, 0.1, 0.2, 0.9, 0.1)]
    assert [len(step.raised) for step in steps] == [0, 1, 0, 0, 1]
    assert [step.metrics["alarm/ess_token"] for step in steps] == [0.0, 1.0, 1.0, 0.0, 1.0]


def density_alarm(density: list[float], value: list[float]) -> list[bool]:
    alarms = Alarms()
    rows = [{"reward/density": d, "reward/verifiable": v} for d, v in zip(density, value, strict=True)]
    return ["density_not_value" in alarms.check(row).active for row in rows]


def test_density_that_rises_alone_is_alarming() -> None:
    steps = 2 * TREND_STEPS
    rising, flat = [0.3 + 0.002 * step for step in range(steps)], [0.5] * steps
    assert density_alarm(rising, flat) == [False] * (steps - 1) + [True]
    assert not any(density_alarm(rising, rising))
    assert not any(density_alarm(flat, flat))
    assert not any(density_alarm(rising[::-1], flat))
    assert density_alarm(rising, rising[::-1])[-1]
    assert not density_alarm(rising + rising[-1:] * steps, [0.0] * 2 * steps)[-1], "what rose long ago is forgotten"


def test_every_alarm_is_a_documented_metric() -> None:
    metrics = Alarms().check({}).metrics
    assert metrics == dict.fromkeys((f"alarm/{name}" for name in NAMES), 0.0)
    assert metrics.keys() <= METRICS.keys()
