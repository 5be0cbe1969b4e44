"""The actor's loops on a scripted engine and a run in memory."""

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from actors import canary
from actors.actor import Actor
from actors.canary import ActorCanary
from actors.follower import WeightFollower
from actors.handoff import Handoff
from actors.outbox import Outbox
from actors.parts import ActorParts
from actors.prompts import LeasedPrompts, Prompt
from actors.scripted_engine import ScriptedEngine, bigram_script, sampling_logprobs
from actors.spool import Spool
from lambdapo_async.broker.interface import Delivery
from lambdapo_async.broker.limits import RunLimits
from lambdapo_async.config import RunConfig
from lambdapo_async.config.sections import SamplingConfig
from lambdapo_async.errors import BrokerUnavailable, EngineError, RunNotFoundError, WeightsError
from lambdapo_async.rollout import Lease
from lambdapo_async.tasks.interface import Row, Scored
from lambdapo_async.weights.canary import Canary, CanaryError, CanaryRow, ModelIdentity
from lambdapo_async.weights.catch_up import Available
from lambdapo_async.weights.delta_file import write_full
from lambdapo_async.weights.manifest import NewFile
from lambdapo_async.weights.state import State
from lambdapo_async.wire import decode_group
from tests.contract.broker_world import durable
from tests.fakes_broker import FakeRun
from tests.weight_states import POOL

VOCAB = 12
EOS = 0
TIMEOUT_S = 20.0
IDENTITY = ModelIdentity.of({"config.json": b"{}"})
CONFIG = RunConfig.model_validate(
    {
        "model": {"path": "unused", "max_length": 32},
        "task": {"kind": "arithmetic"},
        "sampling": {"max_tokens": 16},
        "rollout": {"group_size": 3, "groups_per_step": 4},
        "staleness": {"max_staleness": 1},
        "broker": {"heartbeat_s": 0.02, "lease_s": 5.0},
        "actor": {"max_groups_in_flight": 3, "drain_s": 5.0},
    }
)


def config_with(**actor: object) -> RunConfig:
    return CONFIG.model_copy(update={"actor": CONFIG.actor.model_copy(update=actor)})


class DigitTokenizer:
    """Ids are numbers; a text is its ids."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [int(word) for word in text.split()]

    def apply_chat_template(self, conversation: object, *, add_generation_prompt: bool, tokenize: bool) -> str:
        raise NotImplementedError

    def batch_decode(self, sequences: list[list[int]], *, skip_special_tokens: bool) -> list[str]:
        return [" ".join(map(str, ids)) for ids in sequences]


class RowEncoder:
    def encode(self, row: Row) -> list[int]:
        return [int(word) for word in row.prompt.split()]


class LengthScorer:
    """Rewards a completion by its length; can be held up."""

    def __init__(self) -> None:
        self.failures = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.waiting = 0

    async def score(self, row: Row, completions: Sequence[str]) -> list[Scored]:
        self.waiting += 1
        await self.gate.wait()
        self.waiting -= 1
        return [Scored(float(len(text.split())), {"verifiable": 1.0}) for text in completions]


def scripted(version: int, *, off_by: float) -> tuple[float, float]:
    """log pi of 3 and 4 after 1, 2."""
    logits = [bigram_script(VOCAB)(version, context) for context in ([1, 2], [1, 2, 3])]
    first, second = (sampling_logprobs(each, SamplingConfig()) for each in logits)
    return float(first[3]) - off_by, float(second[4]) - off_by


class Stage:
    """An actor, its run, and the learner's hand on the run."""

    def __init__(self, tmp_path: Path, *, num_rows: int = 5) -> None:
        self.run = FakeRun("stage")
        self.folder = tmp_path
        self.run.run_store.create(b"{}", {}, fence=1)
        for split in ("train", "heldout"):
            rows = [Row(prompt=f"{i + 1} 2", answer="x").as_map() for i in range(num_rows)]
            self.run.run_store.put_rows(split, rows)
        self.source = self.run.source(1, RunLimits.of(CONFIG))
        self.source.initialise(durable())
        self.engine = ScriptedEngine(bigram_script(VOCAB), eos_token_id=EOS, max_length=32)
        self.scorer = LengthScorer()
        self.spools = tmp_path / "spools"
        self.spools.mkdir()
        self.outbox = self.new_outbox("a.0")
        self.orphans: tuple[Outbox, ...] = ()
        self.hurries = asyncio.Event()
        self.actor = Actor(self.parts())
        self.deliveries: list[Delivery] = []

    def parts(self, config: RunConfig = CONFIG, *, actor_id: str = "a") -> ActorParts:
        run = self.run
        follower = WeightFollower(ImpatientWeights(run), self.engine, run_id="stage", folder=self.folder, config=config)
        return ActorParts(
            actor_id=actor_id,
            config=config,
            engine=self.engine,
            follower=follower,
            canary=ActorCanary(
                run.canary, self.engine, IDENTITY, checksum_of=follower.checksum_of, every_s=3600, timeout_s=TIMEOUT_S
            ),
            prompts=LeasedPrompts(run.run_store, RowEncoder(), DigitTokenizer(), config),  # type: ignore[arg-type]
            scorer=self.scorer,  # type: ignore[arg-type]
            outbox=self.outbox if actor_id == "a" else self.new_outbox(f"{actor_id}.0"),
            orphans=self.orphans,
            handoff=Handoff(
                run.partials(actor_id),
                run.seal,
                config,
                actor_id=actor_id,
                vocab_size=VOCAB,
                newest_version=lambda: 100,
            ),
            admission=run.admission(actor_id),
            fleet=run.fleet,
            run_store=run.run_store,
            hurry=self.hurries.set,
        )

    def new_outbox(self, producer: str) -> Outbox:
        epoch = self.run.run_store.state().epoch
        return Outbox(self.run.sink(), Spool.create(self.spools, producer), epoch=epoch, outage_s=5.0)

    def publish(self, version: int, *, consumed: int = 0, canary_off_by: float = 0.0) -> None:
        state = State.of_torch(version, {"w": torch.full((3,), float(version))})
        row = CanaryRow(prompt_ids=(1, 2), completion_ids=(3, 4), logprobs=scripted(version, off_by=canary_off_by))
        canary = Canary(
            version=version,
            checksum=state.checksum(POOL),
            config_hash=IDENTITY.config_hash,
            tokenizer_hash=IDENTITY.tokenizer_hash,
            dtype="float32",
            rows=(row,),
        )
        self.run.canary.put_canary(canary.to_bytes(), fence=1)
        self.publish_whole(version, write_full(state, run_id="stage", pool=POOL), consumed=consumed)

    def publish_whole(self, version: int, payload: bytes, *, consumed: int = 0) -> None:
        file = NewFile(Available(version=version, num_bytes=len(payload)), payload)
        self.run.weights.publish(version, [file], consumed=consumed, fence=1)

    def open(self) -> None:
        self.publish(0)
        self.run.run_store.set_phase("running", fence=1)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not condition():
                await asyncio.sleep(0.001)

    async def take(self, count: int) -> list[Delivery]:
        """Groups as the learner reads them."""
        async with asyncio.timeout(TIMEOUT_S):
            while len(self.deliveries) < count:
                self.deliveries += await asyncio.to_thread(self.source.read, 10, timeout_s=0.01)
        return self.deliveries


class ImpatientWeights:
    """The fake store with short waits, so that a cancelled follower's thread ends soon."""

    def __init__(self, run: FakeRun) -> None:
        self._weights = run.weights
        self.fetch, self.head, self.files = run.weights.fetch, run.weights.head, run.weights.files
        self.publish = run.weights.publish

    def wait_newer(self, than: int, *, timeout_s: float) -> int | None:
        return self._weights.wait_newer(than, timeout_s=min(timeout_s, 0.02))


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


@contextlib.asynccontextmanager
async def acting(stage: Stage):
    task = asyncio.ensure_future(stage.actor.run())
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


def group_of(delivery: Delivery):
    return decode_group(delivery.payload, vocab_size=VOCAB, max_version=100)


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
