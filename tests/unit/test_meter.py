"""The meter: idle only while no request runs."""

from actors.meter import EngineMeter


def test_busy_engine_is_not_idle_and_counts() -> None:
    meter = EngineMeter()
    meter.beat()
    with meter.request():
        with meter.request():
            meter.count(2, 30)
        meter.beat()
        rate, idle_share = meter.beat()
        assert rate > 0.0
        assert idle_share == 0.0
    assert (meter.completions, meter.tokens) == (2, 30)


def test_idle_engine_is_idle_all_the_time() -> None:
    meter = EngineMeter()
    with meter.request():
        meter.beat()
    meter.beat()
    _, idle_share = meter.beat()
    assert idle_share > 0.99
