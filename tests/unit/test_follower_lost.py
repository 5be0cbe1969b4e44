"""Weights of which Redis lost a piece: another way leads there, or the learner publishes them again, or it ends."""

import asyncio
from pathlib import Path

import pytest

from lambdapo_async.errors import WeightsError, WeightsLostError
from tests.following_actor import TIMEOUT_S, FollowingActor, Learner


def evicted(payload: bytes) -> bytes:
    """A damage: one piece of the file is not in Redis any more."""
    raise WeightsLostError("chunk 1 is gone")


async def test_a_piece_that_redis_lost_costs_a_keyframe(learner: Learner, actor: FollowingActor) -> None:
    await actor.catch_up()
    learner.step()
    learner.store.damage = {1: evicted}
    await actor.catch_up()
    actor.assert_has_the_learners_bits()
    assert (actor.counter("weight_failures"), actor.counter("weights_failed")) == (1, 0)


async def test_a_piece_without_which_nothing_leads_to_the_head_is_waited_for(
    learner: Learner, actor: FollowingActor
) -> None:
    """The learner looks every ten seconds, and publishes whole weights under the next number."""
    await actor.catch_up()
    learner.step()
    learner.store.damage = {0: evicted, 1: evicted}
    async with actor.following() as task:
        async with asyncio.timeout(TIMEOUT_S):
            while actor.counter("weight_failures") < 2:
                await asyncio.sleep(0)
        for _ in range(3):  # it looks for a newer head, and at nothing else
            await asyncio.to_thread(learner.store.looked_for.acquire, timeout=TIMEOUT_S)
        assert not task.done()
        assert len(learner.store.fetched) == 3, "what is lost is not fetched again and again"
        assert actor.engine.policy_version == 0, "it samples on under what it has"
        learner.publish_whole()
        async with asyncio.timeout(TIMEOUT_S):
            while actor.counter("weight_updates") < 2:
                await asyncio.sleep(0)
    actor.assert_has_the_learners_bits()
    assert (actor.counter("weight_failures"), actor.counter("weights_failed")) == (2, 0)


async def test_a_piece_that_redis_lost_is_not_waited_for_without_end(learner: Learner, tmp_path: Path) -> None:
    actor = FollowingActor(learner, tmp_path / "actor", data_timeout_s=0.05)
    await actor.catch_up()
    learner.step()
    learner.store.damage = {0: evicted, 1: evicted}
    with pytest.raises(WeightsError, match=r"did not come back within learner\.data_timeout_s = 0\.05"):
        await actor.catch_up()
    assert actor.counter("weights_failed") == 1
    assert actor.follower.is_behind, "nothing may be leased any more"
