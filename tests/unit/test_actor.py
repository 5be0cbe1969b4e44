"""The actor's loops on a scripted engine and a run in memory."""

import asyncio
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest

from actors import canary
from actors.actor import Actor
from actors.prompts import LeasedPrompts, Prompt
from lambdapo_async.errors import BrokerUnavailable, EngineError, RunNotFoundError, WeightsError
from lambdapo_async.rollout import Lease
from lambdapo_async.weights.canary import CanaryError
from tests.actor_stage import CONFIG, EOS, TIMEOUT_S, Stage, acting, group_of
from tests.contract.broker_world import durable
from tests.fakes_admission import FakeAdmission


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


async def test_an_actor_whose_numbers_are_not_the_learners_leases_nothing_and_ends(stage: Stage) -> None:
    stage.publish(0, canary_off_by=0.1)
    stage.run.run_store.set_phase("running", fence=1)
    async with acting(stage) as task:
        with pytest.raises(CanaryError, match="does not sample from the learner's policy"):
            await asyncio.wait_for(asyncio.shield(task), TIMEOUT_S)
    assert stage.source.stats().admitted == 0
    assert stage.run.fleet.members() == ()


async def test_groups_are_whole_tagged_and_numbered(stage: Stage) -> None:
    stage.open()
    async with acting(stage):
        deliveries = await stage.take(8)
    assert [delivery.descriptor.seq for delivery in deliveries] == list(range(1, 9))
    assert {delivery.descriptor.lease.index for delivery in deliveries} == set(range(8))
    for delivery in deliveries:
        group = group_of(delivery)
        assert len(group.rollouts) == 3
        assert {span.policy_version for rollout in group.rollouts for span in rollout.version_spans} == {0}
        for rollout in group.rollouts:
            assert rollout.reward == rollout.num_tokens
            assert (rollout.completion_ids[-1] == EOS) == (rollout.finish_reason == "stop")


async def test_nothing_is_sampled_before_weights_or_beyond_the_gate(stage: Stage) -> None:
    stage.run.run_store.set_phase("running", fence=1)
    async with acting(stage):
        await stage.until(lambda: len(stage.run.fleet.members()) == 1)
        assert stage.run.fleet.members()[0].state == "starting"
        stage.publish(0)
        await stage.take(8)
        await stage.until(lambda: stage.run.fleet.members()[0].groups_sent == 8)
        assert stage.source.stats().admitted == 8
        assert stage.source.stats().leased == 0
        stage.source.release(4)
        await stage.take(12)
    assert stage.source.stats().queued == 12


async def test_held_out_prompts_are_answered_once_and_alone(stage: Stage) -> None:
    stage.open()
    asked = [Lease("heldout", index, 7) for index in range(4)]
    stage.source.request_evaluation(asked)
    async with acting(stage):
        deliveries = await stage.take(12)
    held_out = [delivery for delivery in deliveries if delivery.descriptor.lease.split == "heldout"]
    assert sorted(delivery.descriptor.lease.id for delivery in held_out) == sorted(lease.id for lease in asked)
    assert all(len(group_of(delivery).rollouts) == 1 for delivery in held_out)


async def test_new_weights_are_followed_to_the_newest(stage: Stage) -> None:
    stage.open()
    async with acting(stage):
        await stage.take(8)
        stage.publish(1)
        stage.publish(5, consumed=8)
        deliveries = await stage.take(16)
    assert max(group_of(delivery).max_version for delivery in deliveries) == 5
    assert stage.engine.policy_version == 5


async def test_an_actor_that_is_set_aside_passes_a_canary_to_come_back(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canary, "_SOONEST_S", 0.01)
    stage.open()
    async with acting(stage):
        await stage.take(8)
        stage.run.fleet_control(1).quarantine(["a"])
        stage.source.release(8)
        await stage.until(lambda: stage.run.fleet.members()[0].state == "quarantined")
        await stage.until(lambda: stage.run.fleet.members()[0].counters["canary_checks"] >= 2)
        assert stage.source.stats().leased == 0
        stage.run.fleet_control(1).readmit(["a"])
        await stage.take(16)


async def test_a_lost_lease_is_not_sampled_to_the_end(stage: Stage) -> None:
    stage.scorer.gate.clear()
    stage.open()
    async with acting(stage):
        await stage.until(lambda: stage.scorer.waiting == 3)
        # Somebody took the leases away, as expiry would.
        stage.run.admission("a").hand_back([Lease("train", index) for index in range(3)])
        await stage.until(lambda: any(m.counters["leases_lost"] >= 3 for m in stage.run.fleet.members()))
        stage.scorer.gate.set()
        deliveries = await stage.take(8)
    indices = [delivery.descriptor.lease.index for delivery in deliveries]
    assert sorted(indices) == list(range(8))


class ThawedAdmission(FakeAdmission):
    """Of a server that froze after its first grant: unrenewed, that lease expired before it answers again."""

    granted: tuple[Lease, ...] = ()

    def lease(self, max_count: int) -> tuple[Lease, ...]:
        leases = super().lease(1)
        if not self.granted:
            self._state.held = {lease: (holder, 0.0) for lease, (holder, _) in self._state.held.items()}
        self.granted += leases
        return leases

    def renew(self, leases: Sequence[Lease]) -> tuple[Lease, ...]:
        return ()


async def test_an_expired_lease_that_comes_back_is_answered_once(stage: Stage) -> None:
    stage.scorer.gate.clear()
    stage.open()
    admission = ThawedAdmission(stage.run.shared, "a")
    stage.actor = Actor(dataclasses.replace(stage.parts(), admission=admission))
    async with acting(stage):
        await stage.until(lambda: len(admission.granted) == 4)
        assert admission.granted[0] == admission.granted[1]
        await stage.until(lambda: stage.scorer.waiting == 3)
        stage.scorer.gate.set()
        deliveries = await stage.take(8)
    assert sorted(delivery.descriptor.lease.index for delivery in deliveries) == list(range(8))


async def test_a_dead_engine_ends_the_actor_and_frees_its_leases(stage: Stage) -> None:
    stage.open()
    async with acting(stage) as task:
        await stage.take(1)
        await stage.engine.shutdown()
        stage.source.release(8)
        with pytest.raises(EngineError):
            await asyncio.wait_for(asyncio.shield(task), TIMEOUT_S)
    assert stage.source.stats().leased == 0
    assert stage.run.fleet.members() == ()


async def test_a_run_that_vanished_is_waited_for(stage: Stage) -> None:
    stage.open()
    async with acting(stage):
        await stage.take(8)
        stage.source.commit({"a.0": 8})
        stage.run.shared.phase = None
        stage.run.shared.restart()
        await stage.until(lambda: stage.actor._vigil._gone_since is not None)
        stage.run.run_store.create(b"{}", {}, fence=1)
        stage.source.initialise(durable({"a.0": 8}, consumed=8, next_index=8))
        stage.run.run_store.set_phase("running", fence=1)
        await stage.take(16)


async def test_rows_that_went_after_their_lease_are_waited_for(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.open()
    rows, prompt_of, missed = stage.run.shared.rows.pop("train"), LeasedPrompts.of, []

    def of(prompts: LeasedPrompts, lease: Lease) -> Prompt:
        try:
            return prompt_of(prompts, lease)
        except RunNotFoundError:
            missed.append(lease)
            raise

    monkeypatch.setattr(LeasedPrompts, "of", of)
    async with acting(stage):
        await stage.until(lambda: len(missed) > 0)
        stage.run.shared.rows["train"] = rows
        await stage.take(8)


@pytest.mark.parametrize("sign", ["run", "learner"])
async def test_a_run_that_nobody_drives_ends_the_actor(stage: Stage, sign: str) -> None:
    outage_s = 0.2
    brief = CONFIG.model_copy(update={"broker": CONFIG.broker.model_copy(update={"outage_s": outage_s})})
    stage.actor = Actor(dataclasses.replace(stage.parts(), config=brief))
    stage.open()
    async with acting(stage) as task:
        await stage.take(8)
        if sign == "run":
            stage.run.shared.phase = None
        else:
            stage.run.shared.learner_silent_s = 2 * outage_s
        with pytest.raises(BrokerUnavailable, match=r"outage_s = 0\.2"):
            await asyncio.wait_for(asyncio.shield(task), TIMEOUT_S)


async def test_weights_that_cannot_be_had_twice_end_the_actor(stage: Stage) -> None:
    stage.open()
    async with acting(stage) as task:
        await stage.take(1)
        stage.publish_whole(1, b"damaged")
        with pytest.raises(WeightsError):
            await asyncio.wait_for(asyncio.shield(task), TIMEOUT_S)
    assert stage.engine.policy_version == 0
