"""The meter: idle only while no request runs, over ten seconds."""

import pytest

from actors.meter import EngineMeter


class Clock:
    """Time that passes when it is told to."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_busy_engine_is_not_idle_and_counts() -> None:
    clock = Clock()
    meter = EngineMeter(clock)
    with meter.request():
        with meter.request():
            clock.now_s += 2.0
            meter.count(2, 30)
        clock.now_s += 1.0
        assert meter.beat() == (10.0, 0.0)
    assert (meter.completions, meter.tokens) == (2, 30)


def test_idle_engine_is_idle_all_the_time() -> None:
    clock = Clock()
    meter = EngineMeter(clock)
    clock.now_s += 3.0
    assert meter.beat() == (0.0, 1.0)


def test_idleness_is_that_of_ten_seconds_and_not_of_the_last_beat() -> None:
    clock = Clock()
    meter = EngineMeter(clock)
    for _ in range(20):
        with meter.request():
            clock.now_s += 1.0
        meter.beat()
        clock.now_s += 0.5
    _, idle_share = meter.beat()
    assert idle_share == pytest.approx(1 / 3, abs=0.05)
