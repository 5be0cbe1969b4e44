"""What was trained against what was generated."""

import math

import pytest

from lambdapo_async.replay.bias import BiasMeter, BiasState, GroupShape


def test_bias_meter_sees_that_long_and_hard_groups_are_starved() -> None:
    meter = BiasMeter()
    assert math.isnan(meter.length_ratio)
    assert math.isnan(meter.difficulty_gap)
    short, long = GroupShape(100, 0.2), GroupShape(900, 0.8)
    for shape in (short, long):
        meter.generated(shape)
    meter.trained(short)
    meter.dropped("stale", long)
    meter.dropped("stale", GroupShape(1024, 1.0))
    meter.dropped("stale", GroupShape(0, 1.0))
    for each in (meter, BiasMeter(BiasState.model_validate_json(meter.state().model_dump_json()))):
        assert each.length_ratio == pytest.approx(100 / 500)
        assert each.difficulty_gap == pytest.approx(0.2 - 0.5)
        assert list(each.dropped_by_length("stale").items()) == [(0, 1), (1024, 2)]
        assert each.dropped_by_length("evicted") == {}


def test_groups_without_tokens_have_no_length_to_compare() -> None:
    meter = BiasMeter()
    meter.generated(GroupShape(0, 1.0))
    meter.trained(GroupShape(0, 1.0))
    assert math.isnan(meter.length_ratio)
    assert meter.difficulty_gap == 0.0


@pytest.mark.parametrize(("length", "bucket"), [(0, 0), (1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (1025, 2048)])
def test_length_buckets_are_powers_of_two(length: int, bucket: int) -> None:
    assert GroupShape(length, 0.0).bucket == bucket
