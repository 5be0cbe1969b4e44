"""An actor that ends owes nothing: what it cannot finish is handed back, or on to the next."""

import asyncio
import dataclasses
from pathlib import Path

import pytest

from actors.actor import Actor
from actors.outbox import Outbox
from actors.scripted_engine import ScriptedEngine, bigram_script
from actors.spool import Spool
from lambdapo_async.wire import decode_group
from tests.actor_stage import EOS, TIMEOUT_S, VOCAB, Stage, acting, config_with, group_of


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


async def test_an_actor_signs_off_after_a_drain_and_owes_nothing(stage: Stage) -> None:
    stage.open()
    async with acting(stage) as task:
        await stage.take(2)
        stage.actor.drain()
        await asyncio.wait_for(task, TIMEOUT_S)
    assert stage.run.fleet.members() == ()
    stats = stage.source.stats()
    assert (stats.leased, stats.admitted) == (0, stats.queued + stats.returned)


async def test_what_is_not_finished_at_the_deadline_is_handed_back(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.scorer.gate.clear()
    stage.actor = Actor(stage.parts(config_with(drain_s=0.05)))
    stage.open()
    async with acting(stage) as task:
        await stage.until(lambda: stage.scorer.waiting == 3)
        stage.actor.drain()
        await asyncio.wait_for(task, TIMEOUT_S)
    stats = stage.source.stats()
    assert (stats.leased, stats.returned, stats.queued) == (0, 3, 0)


class SlowingEngine(ScriptedEngine):
    """Samples a few tokens of each group and then waits, as a group that outlives a drain does."""

    tokens_before_pause = 3

    def __init__(self) -> None:
        super().__init__(bigram_script(VOCAB), eos_token_id=EOS, max_length=32)
        self.is_paused, self.num_paused = True, 0

    async def sample_group(self, prompt_ids, *, size, sampling, seed=None):
        if self.is_paused:
            sampling = sampling.model_copy(update={"max_tokens": self.tokens_before_pause})
        completions = await super().sample_group(prompt_ids, size=size, sampling=sampling, seed=seed)
        if not self.is_paused:
            return completions
        self.num_paused += 1
        while self.is_paused:
            await asyncio.sleep(0.001)
        return tuple(
            dataclasses.replace(each, finish_reason="abort") if each.finish_reason == "length" else each
            for each in completions
        )

    async def abort_all(self) -> None:
        self.is_paused = False


async def test_another_actor_continues_what_a_drained_one_began(tmp_path: Path) -> None:
    """The finished group carries the tokens, log-probabilities and versions of both."""
    stage = Stage(tmp_path)
    hasty = config_with(drain_s=0.05, handoff=True)
    stage.engine = slowing = SlowingEngine()
    stage.actor = Actor(stage.parts(hasty))
    stage.open()
    async with acting(stage) as task:
        await stage.until(lambda: slowing.num_paused == 3)
        stage.actor.drain()
        await asyncio.wait_for(task, TIMEOUT_S)
    stats = stage.source.stats()
    assert (stats.leased, stats.returned, stats.queued) == (0, 3, 0)
    left = {
        lease: decode_group(kept, vocab_size=VOCAB, max_version=0) for lease, kept in stage.run.shared.partials.items()
    }
    assert len(left) == 3
    assert all(1 <= rollout.num_tokens <= 3 for group in left.values() for rollout in group.rollouts)

    stage.publish(1)
    stage.engine = ScriptedEngine(bigram_script(VOCAB), eos_token_id=EOS, max_length=32)
    heir = stage.parts(hasty, actor_id="b")
    stage.actor = Actor(heir)
    async with acting(stage):
        deliveries = await stage.take(8)
        await stage.until(lambda: heir.handoff.counters()["partials_continued"] == 3)
    finished = {delivery.descriptor.lease: group_of(delivery) for delivery in deliveries}
    assert sorted(lease.index for lease in finished) == list(range(8))
    for lease, beginning in left.items():
        whole = finished[lease]
        assert whole.actor_id == "b"
        assert whole.timing.started_at == beginning.timing.started_at
        for before, after in zip(beginning.rollouts, whole.rollouts, strict=True):
            num_old = before.num_tokens
            assert after.completion_ids[:num_old].tolist() == before.completion_ids.tolist()
            assert after.behavior_logprobs[:num_old].tolist() == before.behavior_logprobs.tolist()
            is_continued = before.finish_reason == "abort"
            assert (after.num_tokens > num_old) == is_continued
            assert after.token_versions.tolist() == [0] * num_old + [1] * (after.num_tokens - num_old)
            assert after.finish_reason == ("stop" if after.completion_ids[-1] == EOS else "length")
            assert after.reward == after.num_tokens
    assert stage.run.shared.partials == {}


async def test_a_group_that_was_being_rewarded_is_handed_on_whole(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.scorer.gate.clear()
    stage.actor = Actor(stage.parts(config_with(drain_s=0.05, handoff=True)))
    stage.open()
    async with acting(stage) as task:
        await stage.until(lambda: stage.scorer.waiting == 3)
        stage.actor.drain()
        await asyncio.wait_for(task, TIMEOUT_S)
    left = [decode_group(kept, vocab_size=VOCAB, max_version=0) for kept in stage.run.shared.partials.values()]
    assert len(left) == 3
    assert all(rollout.finish_reason != "abort" for group in left for rollout in group.rollouts)


async def test_the_end_of_the_run_drains_the_actor(stage: Stage) -> None:
    stage.open()
    async with acting(stage) as task:
        await stage.take(8)
        stage.run.run_store.set_phase("finished", fence=1)
        await asyncio.wait_for(task, TIMEOUT_S)


async def test_an_actor_does_not_finish_groups_that_nobody_waits_for(stage: Stage) -> None:
    """The run has ended; its groups would have ``drain_s`` otherwise."""
    stage.scorer.gate.clear()
    stage.actor = Actor(stage.parts(config_with(drain_s=1000.0)))
    stage.open()
    async with acting(stage) as task:
        await stage.until(lambda: stage.scorer.waiting == 3)
        stage.run.run_store.set_phase("finished", fence=1)
        await asyncio.wait_for(task, TIMEOUT_S)
    assert stage.source.stats().leased == 0


async def test_an_actor_whose_groups_are_committed_leaves_no_file(stage: Stage) -> None:
    stage.open()
    async with acting(stage) as task:
        await stage.take(8)
        stage.source.commit({"a.0": 8})
        stage.actor.drain()
        await asyncio.wait_for(task, TIMEOUT_S)
    assert stage.hurries.is_set()
    assert list(stage.spools.iterdir()) == []


async def test_unconfirmed_groups_stay_for_the_next_actor(stage: Stage) -> None:
    stage.open()
    async with acting(stage) as task:
        await stage.take(8)
        stage.actor.drain()
        await asyncio.wait_for(task, TIMEOUT_S)
    (spool,) = Spool.adopt(stage.spools)
    assert spool.sequence_numbers() == list(range(1, 9))
    stage.orphans = (Outbox.adopted(stage.run.sink(), spool, epoch=stage.run.run_store.state().epoch, outage_s=5.0),)
    stage.outbox = stage.new_outbox("b.0")
    stage.actor = Actor(stage.parts())
    stage.source.commit({"a.0": 8})
    async with acting(stage) as task:
        await stage.until(lambda: not (stage.spools / "a.0").exists())
