"""Weights that are damaged, gone, another run's or another model's never reach the engine."""

import asyncio
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lambdapo_async.errors import EngineError, WeightsError, WeightsGoneError
from tests.following_actor import (
    NORM,
    SHAPES,
    TIMEOUT_S,
    UNION_EVERY,
    FollowingActor,
    Learner,
    flip_one_bit,
)

DAMAGES = {
    "bit": flip_one_bit,
    "cut": lambda payload: payload[: len(payload) // 2],
    "nothing": lambda payload: b"",
    "noise": lambda payload: b"not weights" * 10,
}


@pytest.mark.parametrize("damage", list(DAMAGES))
async def test_damage_costs_a_keyframe_and_is_counted(learner: Learner, actor: FollowingActor, damage: str) -> None:
    await actor.catch_up()
    learner.step()
    learner.store.damage[1] = DAMAGES[damage]
    await actor.catch_up()
    actor.assert_has_the_learners_bits()
    assert actor.counter("weight_failures") == 1
    assert [(file.version, file.base_version) for file in learner.store.fetched] == [
        (0, None),
        (1, 0),
        (0, None),
        (1, 0),
    ]


async def test_a_file_that_goes_while_we_fetch_costs_a_keyframe(learner: Learner, actor: FollowingActor) -> None:
    await actor.catch_up()
    learner.step()

    def gone(payload: bytes) -> bytes:
        raise WeightsGoneError("version 1 is gone")

    learner.store.damage[1] = gone
    await actor.catch_up()
    actor.assert_has_the_learners_bits()
    assert actor.counter("weight_failures") == 1


def sleep_through(learner: Learner) -> None:
    """So many versions that only a union leads to the head."""
    for _ in range(2 * UNION_EVERY):
        learner.step()


def overtaking(learner: Learner, times: float) -> Callable[[bytes], bytes]:
    """A damage: the next union takes the place of the one that is about to be fetched, ``times`` in a row."""

    def overtake(_: bytes) -> bytes:
        name = f"{learner.state.version}.union"
        for _version in range(UNION_EVERY):
            learner.step()
        if times > 1:
            learner.store.damage[learner.state.version] = overtaking(learner, times - 1)
        raise WeightsGoneError(f"{name} is gone: the head is {learner.state.version}")

    return overtake


async def test_unions_that_newer_ones_replace_are_nobodys_fault(learner: Learner, actor: FollowingActor) -> None:
    await actor.catch_up()
    sleep_through(learner)
    learner.store.damage[learner.state.version] = overtaking(learner, 4)
    await actor.catch_up()
    actor.assert_has_the_learners_bits()
    assert actor.counter("weight_overtaken") == 4
    assert actor.counter("weight_failures") == 0
    assert actor.counter("weight_keyframes") == 1, "what the mirror had was not damaged"


async def test_damage_after_a_replaced_file_is_the_first_failure(learner: Learner, actor: FollowingActor) -> None:
    await actor.catch_up()
    sleep_through(learner)
    head = learner.state.version
    learner.store.damage = {head: overtaking(learner, 1), head + UNION_EVERY: flip_one_bit}
    await actor.catch_up()
    actor.assert_has_the_learners_bits()
    assert actor.counter("weight_failures") == 1


async def test_weights_that_are_always_replaced_end_the_actor_at_the_deadline(learner: Learner, tmp_path: Path) -> None:
    actor = FollowingActor(learner, tmp_path / "actor", data_timeout_s=0.05)
    await actor.catch_up()
    sleep_through(learner)
    learner.store.damage[learner.state.version] = overtaking(learner, math.inf)
    with pytest.raises(WeightsError, match=r"learner\.data_timeout_s = 0\.05 s every version was replaced"):
        await actor.catch_up()
    assert actor.counter("weights_failed") == 1
    assert actor.follower.is_behind, "nothing may be leased any more"


async def test_a_file_that_is_gone_while_the_head_stays_is_a_failure(learner: Learner, actor: FollowingActor) -> None:
    """Nobody replaced it: a folder that this machine does not reach."""
    await actor.catch_up()
    learner.step()

    def gone(_: bytes) -> bytes:
        raise WeightsGoneError("1.step is gone: no file:///nowhere/1.step")

    learner.store.damage = {0: gone, 1: gone}
    with pytest.raises(WeightsGoneError, match=r"1\.step is gone"):
        await actor.catch_up()
    assert actor.counter("weight_failures") == 2
    assert actor.counter("weight_overtaken") == 0


async def test_two_failures_in_a_row_stop_sampling_and_end_the_actor(learner: Learner, actor: FollowingActor) -> None:
    await actor.catch_up()
    learner.step()
    learner.store.damage = {0: flip_one_bit, 1: flip_one_bit}
    with pytest.raises(WeightsError):
        await actor.catch_up()
    assert actor.counter("weights_failed") == 1
    assert actor.counter("weight_failures") == 2
    assert actor.follower.is_behind, "nothing may be leased any more"
    assert actor.engine.policy_version == 0


async def test_weights_that_are_gone_are_waited_for(learner: Learner, actor: FollowingActor) -> None:
    """Twice in a row Redis loses everything in the middle of a fetch: nobody's fault, and the learner comes back."""
    await actor.catch_up()
    learner.step()
    learner.store.damage = {1: learner.store.lose_everything, 2: learner.store.lose_everything}
    async with actor.following() as task:
        for number in (1, 2):
            async with asyncio.timeout(TIMEOUT_S):
                while actor.counter("weight_failures") < number:
                    await asyncio.sleep(0)
            assert not task.done()
            learner.publish_whole()
    await actor.catch_up()
    actor.assert_has_the_learners_bits()
    assert actor.counter("weight_failures") == 2
    assert actor.counter("weights_failed") == 0


async def test_a_head_that_went_back_is_not_followed_and_its_successor_is(
    learner: Learner, actor: FollowingActor
) -> None:
    for _ in range(5):
        learner.step()
    await actor.catch_up()
    learner.store.roll_back(3)
    async with actor.following() as task:
        # It looked at the older head and stayed where it was.
        await asyncio.to_thread(actor.learner.store.looked_for.acquire, timeout=TIMEOUT_S)
        await asyncio.to_thread(actor.learner.store.looked_for.acquire, timeout=TIMEOUT_S)
        assert not task.done()
        assert actor.engine.policy_version == 5
        learner.publish_whole()
        await asyncio.wait_for(until_adopted(actor), TIMEOUT_S)
        actor.assert_has_the_learners_bits()
    learner.step()
    await actor.catch_up()
    actor.assert_has_the_learners_bits()
    assert (actor.counter("weight_failures"), actor.counter("weight_updates")) == (0, 3)


@pytest.mark.parametrize("head", [2, 3, 4])
async def test_a_head_that_goes_back_in_the_middle_of_a_chain_costs_a_keyframe(
    learner: Learner, actor: FollowingActor, head: int
) -> None:
    """The engine has version 2, the mirror is already at 4 when 5 goes; the head may be between the two."""
    for _ in range(2):
        learner.step()
    await actor.catch_up()
    for _ in range(3):
        learner.step()

    def go_back(_: bytes) -> bytes:
        learner.store.roll_back(head)
        raise WeightsGoneError(f"the file is gone: the head is {head}")

    learner.store.damage = {5: go_back}
    async with actor.following() as task:
        async with asyncio.timeout(TIMEOUT_S):
            while actor.counter("weight_failures") < 1 or actor.engine.policy_version != head:
                await asyncio.sleep(0)
        assert not task.done()
        learner.publish_whole()
    await actor.catch_up()
    actor.assert_has_the_learners_bits()
    learner.step()
    await actor.catch_up()
    actor.assert_has_the_learners_bits()
    assert actor.counter("weight_failures") == 1


async def test_a_mirror_newer_than_the_head_is_given_up(learner: Learner, actor: FollowingActor) -> None:
    """The engine was cut off while it loaded, and the head went back meanwhile."""
    for _ in range(5):
        learner.step()
    actor.follower._catch_up(5)
    learner.store.roll_back(4)
    async with actor.following() as task:
        await asyncio.wait_for(until_adopted(actor), TIMEOUT_S)
        assert not task.done()
        assert actor.engine.policy_version == 4
        learner.publish_whole()
    await actor.catch_up()
    actor.assert_has_the_learners_bits()
    assert actor.counter("weight_failures") == 1


async def until_adopted(actor: FollowingActor) -> None:
    """The next version is adopted."""
    actor.follower.changed.clear()
    await actor.follower.changed.wait()


async def test_weights_that_are_gone_are_not_waited_for_without_end(learner: Learner, tmp_path: Path) -> None:
    actor = FollowingActor(learner, tmp_path / "actor", data_timeout_s=0.05)
    await actor.catch_up()
    learner.step()
    learner.store.damage = {1: learner.store.lose_everything}
    with pytest.raises(WeightsError, match=r"did not come back within learner\.data_timeout_s = 0\.05"):
        await actor.catch_up()
    assert actor.counter("weights_failed") == 1
    assert actor.follower.is_behind, "nothing may be leased any more"


async def test_two_failures_apart_do_not(learner: Learner, actor: FollowingActor) -> None:
    await actor.catch_up()
    for version in (1, 2):
        learner.step()
        learner.store.damage[version] = flip_one_bit
        await actor.catch_up()
    assert actor.counter("weight_failures") == 2
    assert actor.counter("weights_failed") == 0
    actor.assert_has_the_learners_bits()


async def test_weights_that_are_not_finite_never_reach_the_engine(learner: Learner, actor: FollowingActor) -> None:
    await actor.catch_up()
    before = actor.engine.checksum()
    learner.step(lambda tensors: tensors[NORM].fill_(torch.nan))
    with pytest.raises(WeightsError, match="not finite"):
        await actor.catch_up()
    assert actor.engine.checksum() == before


async def test_another_learners_weights_are_refused(learner: Learner, tmp_path: Path) -> None:
    actor = FollowingActor(learner, tmp_path / "actor")
    await actor.catch_up()
    other = Learner(seed=1)
    for each in (learner, other):
        each.step()
    mine, theirs = (next(f for f in each.store.payloads if f.version == 1) for each in (learner, other))
    with pytest.raises(WeightsError, match="was changed"):  # the same numbers, another base
        actor.follower.mirror.advance(mine, other.store.payloads[theirs])
    assert actor.follower.mirror.version is None


async def test_a_model_of_other_shapes_is_refused_by_the_engine(learner: Learner, tmp_path: Path) -> None:
    actor = FollowingActor(learner, tmp_path / "actor")
    await actor.catch_up()
    before = actor.engine.checksum()
    other = Learner(shapes={**SHAPES, NORM: (64,)})
    actor.follower._store = actor.learner.store = other.store  # the run's Redis was filled by another learner
    other.step()
    actor.learner.state = other.state
    actor.follower.mirror.drop()
    with pytest.raises(WeightsError, match=f"{NORM} is BF16 .64., expected BF16 .32."):
        await actor.catch_up()
    assert actor.engine.checksum() == before


async def test_a_failed_swap_ends_the_follower(learner: Learner, actor: FollowingActor) -> None:
    await actor.catch_up()
    actor.engine.die("its process was killed")
    learner.step()
    with pytest.raises(EngineError, match="killed"):
        await actor.catch_up()
