"""An actor on a scripted engine and a run in memory, and the learner's hand on the run."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from actors.actor import Actor
from actors.canary import ActorCanary
from actors.follower import WeightFollower
from actors.handoff import Handoff
from actors.outbox import Outbox
from actors.parts import ActorParts
from actors.prompts import LeasedPrompts
from actors.scripted_engine import ScriptedEngine, bigram_script, sampling_logprobs
from actors.spool import Spool
from lambdapo_async.broker.interface import Delivery
from lambdapo_async.broker.limits import RunLimits
from lambdapo_async.config import RunConfig
from lambdapo_async.config.sections import SamplingConfig
from lambdapo_async.tasks.interface import Row, Scored
from lambdapo_async.weights.canary import Canary, CanaryRow, ModelIdentity
from lambdapo_async.weights.catch_up import Available
from lambdapo_async.weights.delta_file import write_full
from lambdapo_async.weights.manifest import NewFile
from lambdapo_async.weights.state import State
from lambdapo_async.wire import decode_group
from tests.contract.broker_world import durable
from tests.fakes_broker import FakeRun
from tests.impatient_weights import ImpatientWeights
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
        "broker": {"heartbeat_s": 0.02, "lease_s": 60.0},
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
        follower = WeightFollower(
            ImpatientWeights(run.weights), self.engine, run_id="stage", folder=self.folder, config=config
        )
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
