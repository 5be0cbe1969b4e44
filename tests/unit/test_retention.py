import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lambdapo_async.errors import WeightsError
from lambdapo_async.weights.catch_up import Available, plan_catch_up
from lambdapo_async.weights.retention import Retention, rank
from tests.weight_files import full, step, union


def files(*new_files) -> list[Available]:
    return [file.available for file in new_files]


def sized(num_bytes: int) -> bytes:
    return bytes(num_bytes)


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_keyframe_its_union_and_the_steps_after_it_are_live() -> None:
    chain = files(full(0, sized(100)), step(1), step(2), union(2, 0, sized(6)), step(3), step(4))
    ranked = rank(chain)
    assert {(file.version, file.base_min) for file in ranked.live} == {(0, None), (2, 0), (3, None), (4, None)}
    assert [file.version for file in ranked.useful] == [2]  # 1 and 2 together take 8 bytes, the union 6
    assert [file.version for file in ranked.superseded] == [1]


def test_a_newer_keyframe_supersedes_everything() -> None:
    old = files(full(0), step(1), union(1, 0), step(2))
    new = files(full(3))
    assert rank([*old, *new]).superseded == frozenset(old)


def test_the_superseded_stay_for_the_grace_period() -> None:
    clock = Clock()
    retention = Retention(max_bytes=None, grace_s=60, clock=clock)
    published = files(full(0), step(1), full(2))
    assert retention.to_drop(published, incoming_bytes=1) == ()
    clock.now = 59
    assert retention.to_drop(published, incoming_bytes=1) == ()
    clock.now = 60
    assert set(retention.to_drop(published, incoming_bytes=1)) == set(published[:2])


def test_only_the_former_pair_has_grace() -> None:
    """Else a run that publishes whole versions every second would keep sixty of them."""
    published = files(full(0), union(1, 0), full(2), step(3), union(3, 2), full(4), full(5))
    dropped = Retention(max_bytes=None, grace_s=60).to_drop(published, incoming_bytes=1)
    assert sorted((file.version, file.base_min) for file in dropped if file.base_min is None) == [
        (0, None),
        (2, None),
        (3, None),
    ]
    assert [file.version for file in dropped if file.base_min is not None] == [1]


def test_the_oldest_steps_go_first_then_the_former_pair() -> None:
    published = files(full(0, sized(50)), union(3, 0, sized(20)), step(4, sized(5)), step(5, sized(5)), full(6))
    order = []
    for budget in (80, 75, 60, 55, 30):
        dropped = Retention(max_bytes=budget, grace_s=60).to_drop(published, incoming_bytes=1)
        order.append([file.version for file in dropped])
    assert order == [[4, 5], [4, 5, 0], [4, 5, 0], [4, 5, 0], [4, 5, 0]]


def test_what_leads_to_the_head_is_never_dropped() -> None:
    published = files(full(0, sized(50)), union(3, 0, sized(20)), step(4, sized(5)))
    assert Retention(max_bytes=80, grace_s=0).to_drop(published, incoming_bytes=5) == ()
    with pytest.raises(WeightsError, match="75 bytes that lead to the head and 6 new ones: raise it to at least 81"):
        Retention(max_bytes=80, grace_s=0).to_drop(published, incoming_bytes=6)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_plan_misses_what_was_dropped(data: st.DataObject) -> None:
    """Without a budget what goes is exactly what no follower would have taken, wherever it stands."""
    head = data.draw(st.integers(0, 12))
    sizes = st.integers(1, 20).map(sized)
    keyframe = data.draw(st.integers(0, head))
    unions = [data.draw(st.integers(keyframe + 1, head))] if keyframe < head and data.draw(st.booleans()) else []
    published = files(
        full(keyframe, sized(40)),
        *(step(version, data.draw(sizes)) for version in range(1, head + 1)),
        *(union(version, keyframe, data.draw(sizes)) for version in unions),
    )
    dropped = Retention(max_bytes=None, grace_s=0).to_drop(published, incoming_bytes=0)
    kept = [file for file in published if file not in dropped]
    for at in (None, *range(keyframe, head + 1)):
        assert plan_catch_up(kept, at=at, head=head).num_bytes == plan_catch_up(published, at=at, head=head).num_bytes
