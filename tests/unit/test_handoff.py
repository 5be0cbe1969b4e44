"""What an actor leaves and takes: only what begins the very group that is asked for."""

from dataclasses import replace

import numpy as np
import pytest

from actors.engine import Completion
from actors.handoff import Handoff
from actors.prompts import Prompt
from actors.sampled import Sampled
from lambdapo_async.broker.limits import RunLimits
from lambdapo_async.config import RunConfig
from lambdapo_async.rollout import FinishReason, Lease, VersionSpan
from lambdapo_async.tasks.interface import Row
from lambdapo_async.wire import decode_group, encode_group
from tests.contract.broker_world import durable
from tests.fakes_broker import FakeRun

VOCAB = 20
CONFIG = RunConfig.model_validate(
    {
        "model": {"path": "unused", "max_length": 32},
        "task": {"kind": "arithmetic"},
        "sampling": {"max_tokens": 8},
        "rollout": {"group_size": 2, "groups_per_step": 2},
        "staleness": {"max_staleness": 1},
        "actor": {"handoff": True},
    }
)
LEASE = Lease("train", 0)
PROMPT = Prompt(Row(prompt="1 2", answer="x"), np.array([1, 2], np.int32), 2)


def completion(num_tokens: int, reason: FinishReason = "abort", *, version: int = 3, token: int = 5) -> Completion:
    return Completion(
        token_ids=np.full(num_tokens, token, np.int32),
        logprobs=np.full(num_tokens, -0.25, np.float32),
        version_spans=(VersionSpan(version, num_tokens),) if num_tokens else (),
        finish_reason=reason,
    )


SAMPLED = Sampled(prompt=PROMPT, completions=(completion(3), completion(4, "stop")), started_at=100.0, generation_s=2.0)


class World:
    """Two actors of one run; the first holds the lease."""

    def __init__(self) -> None:
        self.run = FakeRun("world")
        self.run.run_store.create(b"{}", {}, fence=1)
        source = self.run.source(1, RunLimits.of(CONFIG))
        source.initialise(durable())
        self.run.run_store.set_phase("running", fence=1)
        self.admission = self.run.admission("a")
        assert LEASE in self.admission.lease(1)
        self.leaver, self.taker = self.handoff("a"), self.handoff("b")

    def handoff(self, actor_id: str, config: RunConfig = CONFIG) -> Handoff:
        return Handoff(
            self.run.partials(actor_id),
            self.run.seal,
            config,
            actor_id=actor_id,
            vocab_size=VOCAB,
            newest_version=lambda: 5,
        )

    def hand_over(self) -> None:
        self.admission.hand_back([LEASE])
        assert LEASE in self.run.admission("b").lease(1)

    def put(self, payload: bytes) -> None:
        """As whoever may write to Redis could."""
        self.hand_over()
        self.run.shared.partials[LEASE] = payload


@pytest.fixture
def world() -> World:
    return World()


def left(world: World, sampled: Sampled = SAMPLED) -> bytes:
    world.leaver.leave({LEASE: sampled})
    return world.run.shared.partials[LEASE]


def test_what_is_left_is_what_is_taken(world: World) -> None:
    world.leaver.leave({LEASE: SAMPLED})
    world.hand_over()
    taken = world.taker.take(LEASE, PROMPT, version=4)
    assert taken is not None
    assert (taken.started_at, taken.generation_s, taken.num_tokens, taken.is_cut_off) == (100.0, 2.0, 7, True)
    for before, after in zip(SAMPLED.completions, taken.completions, strict=True):
        assert after.token_ids.tolist() == before.token_ids.tolist()
        assert after.logprobs.tolist() == before.logprobs.tolist()
        assert (after.version_spans, after.finish_reason) == (before.version_spans, before.finish_reason)
    counters = world.taker.counters()
    assert (counters["partials_continued"], counters["partial_tokens"]) == (1, 7)
    assert world.leaver.counters()["partials_left"] == 1
    world.taker.done(LEASE)
    assert world.run.shared.partials == {}


def test_nothing_is_left_or_taken_without_the_option(world: World) -> None:
    payload = left(world)
    world.run.shared.partials.clear()
    off = CONFIG.model_copy(update={"actor": CONFIG.actor.model_copy(update={"handoff": False})})
    world.handoff("a", off).leave({LEASE: SAMPLED})
    assert world.run.shared.partials == {}
    world.put(payload)
    assert world.handoff("b", off).take(LEASE, PROMPT, version=4) is None


def test_a_group_without_a_token_is_not_worth_a_byte(world: World) -> None:
    world.leaver.leave({LEASE: replace(SAMPLED, completions=(completion(0), completion(0)))})
    assert world.run.shared.partials == {}


def test_what_finds_no_room_is_counted(world: World) -> None:
    world.leaver.leave({Lease("train", 7): SAMPLED})
    assert world.leaver.counters()["partials_refused"] == 1


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda _: b"", id="missing"),
        pytest.param(lambda payload: payload[:-1], id="torn"),
        pytest.param(lambda payload: b"\xc1" + payload, id="not msgpack"),
    ],
)
def test_damage_costs_the_partial_alone(world: World, damage) -> None:
    world.put(damage(left(world)))
    assert world.taker.take(LEASE, PROMPT, version=4) is None
    assert world.taker.counters()["partials_damaged"] == 1
    assert world.run.shared.partials == {}, "the next actor need not look at it again"


@pytest.mark.parametrize(
    ("sampled", "prompt"),
    [
        pytest.param(replace(SAMPLED, completions=(completion(3), completion(9, "length"))), PROMPT, id="too long"),
        pytest.param(replace(SAMPLED, completions=(completion(8), completion(1))), PROMPT, id="nothing to go on with"),
        pytest.param(replace(SAMPLED, completions=(completion(3),)), PROMPT, id="too few samples"),
        pytest.param(replace(SAMPLED, completions=(completion(3, token=20), completion(1))), PROMPT, id="vocabulary"),
        pytest.param(replace(SAMPLED, completions=(completion(3, version=6), completion(1))), PROMPT, id="version"),
        pytest.param(SAMPLED, replace(PROMPT, token_ids=np.array([1, 3], np.int32)), id="another prompt"),
    ],
)
def test_what_does_not_fit_the_group_is_refused(world: World, sampled: Sampled, prompt: Prompt) -> None:
    world.put(left(world, sampled))
    assert world.taker.take(LEASE, prompt, version=4) is None
    assert world.taker.counters()["partials_damaged"] == 1


def test_the_beginning_of_another_group_is_refused(world: World) -> None:
    group = decode_group(left(world), vocab_size=VOCAB, max_version=5)
    world.put(encode_group(replace(group, lease=Lease("train", 1))))
    assert world.taker.take(LEASE, PROMPT, version=4) is None
    assert world.taker.counters()["partials_damaged"] == 1


@pytest.mark.parametrize(("version", "is_continued"), [(3, True), (4, True), (5, False)])
def test_tokens_older_than_the_gate_allows_are_not_continued(world: World, version: int, is_continued: bool) -> None:
    world.leaver.leave({LEASE: SAMPLED})
    world.hand_over()
    assert (world.taker.take(LEASE, PROMPT, version=version) is not None) == is_continued
    assert world.taker.counters()["partials_stale"] == (not is_continued)
