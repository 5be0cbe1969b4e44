"""Actors that follow a learner through real weight files: every one of them must end with the learner's bits."""

import asyncio
import resource
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from actors.between_groups import BetweenGroups
from lambdapo_async.config.sections import SamplingConfig
from lambdapo_async.errors import WeightsError
from lambdapo_async.weights.catch_up import Available
from lambdapo_async.weights.delta_file import make_delta, write_full
from lambdapo_async.weights.state import State
from tests.following_actor import (
    NORM,
    POOL,
    RUN,
    TIMEOUT_S,
    FollowingActor,
    Learner,
)


def publish_over_a_dead_link(learner: Learner, actor: FollowingActor) -> None:
    """A new version, of which the fetch begins and hangs."""
    learner.store.link.clear()
    learner.store.fetching.clear()
    actor.follower.changed.clear()
    learner.step()


async def test_the_engine_is_told_what_changed_since_it_last_loaded(learner: Learner, actor: FollowingActor) -> None:
    await actor.catch_up()
    learner.step(lambda tensors: tensors[NORM].add_(1.0))
    learner.step(lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][3].mul_(2.0))
    await actor.catch_up()
    await actor.catch_up()
    learner.step(lambda tensors: None)
    await actor.catch_up()
    assert actor.engine.loads == [None, {NORM, "model.layers.1.mlp.up_proj.weight"}, frozenset()]
    actor.assert_has_the_learners_bits()


async def test_a_tensor_that_is_sent_whole_is_in_the_file_too(learner: Learner, actor: FollowingActor) -> None:
    """More than can be said in gaps: the delta replaces it, and the mirror's file must not keep the old one."""
    await actor.catch_up()
    for _ in range(2):
        learner.step(lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].normal_())
        learner.step()
        await actor.catch_up()
    actor.assert_has_the_learners_bits()
    assert actor.counter("weight_keyframes") == 1


async def test_many_small_updates_leave_one_file(learner: Learner, actor: FollowingActor, tmp_path: Path) -> None:
    for _ in range(3):
        await actor.catch_up()
        learner.step()
    assert [path.name for path in (tmp_path / "actor").iterdir()] == ["mirror.safetensors"]


async def test_sampling_goes_on_while_a_fetch_hangs(learner: Learner, actor: FollowingActor) -> None:
    await actor.catch_up()
    publish_over_a_dead_link(learner, actor)
    async with actor.following():
        assert await asyncio.to_thread(learner.store.fetching.wait, TIMEOUT_S)
        (completion,) = await actor.engine.sample_group([1], size=1, sampling=SamplingConfig(max_tokens=30))
        assert {span.policy_version for span in completion.version_spans} == {0}
        learner.store.link.set()
        async with asyncio.timeout(TIMEOUT_S):
            await actor.follower.changed.wait()
    actor.assert_has_the_learners_bits()
    counters = actor.follower.counters()
    assert min(counters[f"weight_{name}_s"] for name in ("fetch", "decode", "apply", "pause")) > 0


async def test_leases_wait_for_weights_that_are_on_their_way(
    learner: Learner, actor: FollowingActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert actor.follower.is_behind, "without weights nothing can be sampled"
    await actor.catch_up()
    assert not actor.follower.is_behind
    publish_over_a_dead_link(learner, actor)
    async with actor.following():
        assert await asyncio.to_thread(learner.store.fetching.wait, TIMEOUT_S)
        monkeypatch.setattr("actors.follower._HOLD_S", 3600.0)
        assert actor.follower.is_behind
        monkeypatch.setattr("actors.follower._HOLD_S", 0.0)
        assert not actor.follower.is_behind, "a slow link must not starve the engine"
        learner.store.link.set()


async def test_without_staleness_leases_wait_for_as_long_as_it_takes(
    learner: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor = FollowingActor(learner, tmp_path / "strict", max_staleness=0)
    await actor.catch_up()
    monkeypatch.setattr("actors.follower._HOLD_S", 0.0)
    publish_over_a_dead_link(learner, actor)
    async with actor.following():
        assert await asyncio.to_thread(learner.store.fetching.wait, TIMEOUT_S)
        assert actor.follower.is_behind
        learner.store.link.set()


def test_a_delta_is_applied_once(learner: Learner, actor: FollowingActor) -> None:
    mirror, store = actor.follower.mirror, learner.store
    learner.step()
    full, step = sorted(store.payloads, key=lambda file: file.version)
    mirror.advance(full, store.payloads[full])
    mirror.advance(step, store.payloads[step])
    assert mirror.checksum == learner.state.checksum(POOL)
    with pytest.raises(WeightsError, match="changes 0, the state is 1"):
        mirror.advance(step, store.payloads[step])
    assert mirror.version is None, "what failed must not be built upon"
    with pytest.raises(WeightsError, match="holds nothing"):
        mirror.advance(step, store.payloads[step])


def test_tensors_that_come_and_go_are_followed(actor: FollowingActor, learner: Learner) -> None:
    mirror = actor.follower.mirror
    states = [
        State.of_torch(0, {"a": torch.zeros(3), "b": torch.ones(2, 2).half()}),
        State.of_torch(1, {"a": torch.zeros(3), "c": torch.ones(5).bfloat16(), "empty": torch.zeros(0)}),
        State.of_torch(2, {"a": torch.ones(4), "c": torch.ones(5).bfloat16()}),
    ]
    mirror.advance(Available(version=0, num_bytes=0), write_full(states[0], run_id=RUN, pool=POOL))
    for old, new in pairwise(states):
        payload = make_delta(old, new, run_id=RUN, keyframe_version=0, pool=POOL).to_bytes()
        mirror.advance(Available(version=new.version, num_bytes=0, base_version=old.version), payload)
        found = State.of_torch(new.version, load_file(mirror.path))
        assert found.checksum(POOL) == mirror.checksum == new.checksum(POOL)


def test_a_mirror_without_room_says_what_to_do(actor: FollowingActor, learner: Learner) -> None:
    """Not by the SIGBUS that a write to a mapped file without room ends in."""
    mirror = actor.follower.mirror
    (full,) = learner.store.payloads
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))
    try:
        with pytest.raises(WeightsError, match=r"no room for the \d+ bytes .* actor.mirror = 'disk'"):
            mirror.advance(full, learner.store.payloads[full])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert mirror.version is None


async def versions_of_long_groups(engine: BetweenGroups, count: int) -> Sequence[set[int]]:
    groups = await asyncio.gather(
        *(engine.sample_group([i], size=2, sampling=SamplingConfig(max_tokens=50)) for i in range(count))
    )
    return [{span.policy_version for one in group for span in one.version_spans} for group in groups]


async def test_between_groups_no_group_has_two_versions(learner: Learner, actor: FollowingActor) -> None:
    await actor.catch_up()
    learner.step()
    quiet = BetweenGroups(actor.engine)
    path = actor.follower.mirror.path
    early = asyncio.create_task(versions_of_long_groups(quiet, 3))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    update = asyncio.create_task(quiet.load_weights(1, path))
    await asyncio.sleep(0)
    late = asyncio.create_task(versions_of_long_groups(quiet, 3))
    async with asyncio.timeout(TIMEOUT_S):
        assert await early == [{0}] * 3
        assert await late == [{1}] * 3
        assert await update >= 0


async def test_between_groups_a_cancelled_update_lets_the_groups_go_on(actor: FollowingActor) -> None:
    await actor.catch_up()
    quiet = BetweenGroups(actor.engine)
    early = asyncio.create_task(versions_of_long_groups(quiet, 1))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    update = asyncio.create_task(quiet.load_weights(1, actor.follower.mirror.path))
    await asyncio.sleep(0)
    update.cancel()
    async with asyncio.timeout(TIMEOUT_S):
        assert await early == [{0}]
        assert await versions_of_long_groups(quiet, 1) == [{0}]


def test_time_is_not_counted_twice(actor: FollowingActor, learner: Learner) -> None:
    mirror = actor.follower.mirror
    started = time.monotonic()
    (full,) = learner.store.payloads
    mirror.advance(full, learner.store.payloads[full])
    assert 0 < mirror.decode_s + mirror.apply_s <= time.monotonic() - started
