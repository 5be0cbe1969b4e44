"""What a replay queue may hold: as configured, as completed, and what no queue could keep."""

import pytest

from lambdapo_async.config import RunConfig
from lambdapo_async.replay.limits import ReplayLimits
from tests.replay_entries import make_limits


@pytest.mark.parametrize(
    ("replay", "min_size", "error_buffer"),
    [
        ({}, 4, 4.0),
        ({"max_uses": 8, "samples_per_insert": 2.0}, 4, 4.0),
        ({"max_uses": 8, "samples_per_insert": 6.0}, 4, 6.0),
        ({"max_uses": 8, "samples_per_insert": 8.0}, 4, 8.0),
        ({"max_uses": 8, "samples_per_insert": 2.0, "min_size": 9, "error_buffer": 11.0}, 9, 11.0),
    ],
)
def test_what_the_config_leaves_open_is_the_least_that_lets_both_sides_go_on(
    replay: dict[str, float], min_size: int, error_buffer: float
) -> None:
    tree = {
        "model": {"path": "unused", "max_length": 64},
        "task": {"kind": "arithmetic"},
        "sampling": {"max_tokens": 16},
        "rollout": {"groups_per_step": 4},
        "replay": replay,
    }
    limits = ReplayLimits.of(RunConfig.model_validate(tree))
    assert (limits.rate.groups_per_sample, limits.rate.min_size, limits.rate.error_buffer) == (
        4,
        min_size,
        error_buffer,
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_uses": 0}, "must be positive"),
        ({"half_life": 0.0}, "must be positive"),
        ({"max_groups": 1}, "must hold min_size = 2"),
        ({"max_uses": 2, "ratio": 3.0, "buffer": 9.0}, "more than max_uses = 2 gives"),
        ({"max_uses": 1, "ratio": 1.0, "buffer": 9.0}, "a plain stream takes no ratio"),
    ],
)
def test_contradictory_limits_are_refused(changes: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make_limits(**changes)  # type: ignore[arg-type]
