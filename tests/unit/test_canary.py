import asyncio
import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.canary import ActorCanary
from actors.engine import EngineInfo
from actors.session import _canary
from lambdapo_async.broker.client import Broker
from lambdapo_async.broker.ownership import Ownership
from lambdapo_async.config import RunConfig
from lambdapo_async.config.load import load_config
from lambdapo_async.errors import ConfigError, FencedError, WeightsError
from lambdapo_async.keys import RunKeys
from lambdapo_async.packing import MicroBatch
from lambdapo_async.tasks.interface import Row
from lambdapo_async.tasks.prompts import PromptEncoder
from lambdapo_async.tasks.registry import build_task
from lambdapo_async.weights.canary import TOLERANCES, Canary, CanaryError, CanaryRow, ModelIdentity, compare
from lambdapo_async.weights.canary_store import CanaryStore, RedisCanaryStore
from learner.canary import LearnerCanary, canary_sequences
from learner.character_tokenizer import build_tokenizer
from learner.logprobs import packed_logprobs
from tests.fakes_canary import FakeCanaryStore
from tests.tiny_models import tiny_model

FILES = {"config.json": b"{}", "tokenizer.json": b"t", "generation_config.json": b"g"}
IDENTITY = ModelIdentity.of(FILES)
CHECKSUM = "xxh3_128:" + "0" * 32
ROWS = (
    CanaryRow(prompt_ids=(1, 2), completion_ids=(3, 4, 5), logprobs=(-0.5, -1.0, -2.0)),
    CanaryRow(prompt_ids=(7,), completion_ids=(8,), logprobs=(0.0,)),
)


def canary_of(version: int = 3, *, dtype: str = "float32", checksum: str = CHECKSUM) -> Canary:
    return Canary(
        version=version,
        checksum=checksum,
        config_hash=IDENTITY.config_hash,
        tokenizer_hash=IDENTITY.tokenizer_hash,
        dtype=dtype,
        rows=ROWS,
    )


def scores(*, off_by: float = 0.0) -> list[np.ndarray]:
    return [np.array(row.logprobs, np.float32) - np.float32(off_by) for row in ROWS]


def test_a_canary_survives_its_record() -> None:
    assert Canary.from_bytes(canary_of().to_bytes()) == canary_of()


scalars = st.none() | st.integers(-(2**63), 2**64 - 1) | st.text()


@given(st.binary(max_size=60) | st.recursive(scalars, st.lists).map(msgpack.packb))
@settings(max_examples=50)
def test_any_other_record_is_refused(record: bytes) -> None:
    with pytest.raises(WeightsError):
        Canary.from_bytes(record)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": []},
        {"checksum": "xxh3_128:0"},
        {"version": -1},
        {"more": 1},
        {"rows": [{"prompt_ids": [1], "completion_ids": [2, 3], "logprobs": [-1.0]}]},
        {"rows": [{"prompt_ids": [1], "completion_ids": [2], "logprobs": [float("nan")]}]},
        {"rows": [{"prompt_ids": [1], "completion_ids": [2], "logprobs": [0.1]}]},
        {"rows": [{"prompt_ids": [], "completion_ids": [2], "logprobs": [-1.0]}]},
    ],
)
def test_what_cannot_be_a_canary_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(WeightsError):
        Canary.from_bytes(msgpack.packb({**canary_of().model_dump(), **change}))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_another_model_or_tokenizer_is_another_identity(name: str) -> None:
    other = ModelIdentity.of({**FILES, name: b"other"})
    with pytest.raises(CanaryError, match="config" if name == "config.json" else "tokenizer"):
        canary_of().check_identity(other, checksum=CHECKSUM)


def test_sampling_defaults_are_not_part_of_it_and_other_weights_are() -> None:
    canary_of().check_identity(ModelIdentity.of({**FILES, "generation_config.json": b"x"}), checksum=CHECKSUM)
    with pytest.raises(CanaryError, match="weights"):
        canary_of().check_identity(IDENTITY, checksum=CHECKSUM[:-1] + "1")


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_every_type_has_its_own_tolerance(dtype: str) -> None:
    mean = TOLERANCES[dtype].mean
    assert compare(canary_of(), scores(off_by=0.9 * mean), dtype=dtype).is_passed
    verdict = compare(canary_of(), scores(off_by=1.1 * mean), dtype=dtype)
    assert verdict.mean_gap == pytest.approx(1.1 * mean, rel=1e-3)
    with pytest.raises(CanaryError, match="does not sample from the learner's policy"):
        verdict.check()


def test_one_token_far_off_fails_though_the_mean_is_small() -> None:
    scored = scores()
    scored[1][0] -= 0.15
    verdict = compare(canary_of(), scored, dtype="float16")
    assert (verdict.max_gap, verdict.is_passed) == (pytest.approx(0.15), False)


def test_nan_never_passes() -> None:
    scored = scores()
    scored[0][1] = np.nan
    assert not compare(canary_of(), scored, dtype="fp8").is_passed


def test_the_looser_of_both_types_counts() -> None:
    assert compare(canary_of(dtype="bfloat16"), scores(off_by=0.04), dtype="float32").is_passed


def test_scores_that_cannot_be_compared() -> None:
    with pytest.raises(WeightsError, match="no tolerance"):
        compare(canary_of(), scores(), dtype="fp3")
    with pytest.raises(WeightsError, match="scored"):
        compare(canary_of(), scores()[:1], dtype="float32")


@pytest.fixture(params=["fake", "redis"])
def store(request: pytest.FixtureRequest) -> Iterator[CanaryStore]:
    if request.param == "fake":
        yield FakeCanaryStore()
        return
    with contextlib.closing(Broker(request.getfixturevalue("redis_url"), timeout_s=10)) as broker:
        keys = RunKeys(f"canary-{next(_numbers)}")
        Ownership(broker, keys).take_over(1, {})
        yield RedisCanaryStore(broker, keys)


_numbers = itertools.count()


def test_a_record_answers_the_wish(store: CanaryStore) -> None:
    assert (store.canary(), store.is_canary_asked()) == (None, False)
    store.ask_canary()
    store.ask_canary()
    assert store.is_canary_asked()
    store.put_canary(b"record", fence=1)
    assert (store.canary(), store.is_canary_asked()) == (b"record", False)


def test_a_learner_that_was_replaced_publishes_no_canary(store: CanaryStore) -> None:
    store.put_canary(b"record", fence=1)
    with pytest.raises(FencedError):
        store.put_canary(b"late", fence=0)
    assert store.canary() == b"record"


class Engine:
    """Knows the learner's numbers, shifted; ``on_score`` happens while it scores."""

    def __init__(
        self,
        version: int = 3,
        *,
        off_by: float = 0.0,
        dtype: str = "float32",
        on_score: Callable[[], None] = lambda: None,
    ) -> None:
        self.policy_version, self.off_by, self._on_score = version, off_by, on_score
        self.info = EngineInfo(name="known", device="cpu", dtype=dtype)

    async def score(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> np.ndarray:
        self._on_score()
        known = {row.prompt_ids: row.logprobs for row in ROWS}
        return np.array(known[tuple(prompt_ids)], np.float32) - np.float32(self.off_by)


def actor_canary(
    store: CanaryStore,
    engine: Engine,
    *,
    checksum: str | None = CHECKSUM,
    identity: ModelIdentity = IDENTITY,
    every_s: float = 3600,
    timeout_s: float = 5.0,
) -> ActorCanary:
    return ActorCanary(
        store, engine, identity, checksum_of=lambda version: checksum, every_s=every_s, timeout_s=timeout_s
    )


async def test_an_actor_that_agrees_is_admitted() -> None:
    store = FakeCanaryStore()
    store.put_canary(canary_of().to_bytes(), fence=1)
    canary = actor_canary(store, Engine(off_by=1e-5))
    assert not canary.is_admitted
    await canary.compare()
    assert canary.is_admitted
    counters = canary.counters()
    assert counters["canary_mean_gap"] == pytest.approx(1e-5, rel=0.1)
    assert (counters["canary_checks"], counters["canary_failures"], store.wishes) == (1, 0, 0)


@pytest.mark.parametrize(
    ("difference", "message"),
    [
        ({"engine": Engine(off_by=1.9)}, r"differs from the learner by 1\.9 nats"),
        ({"checksum": CHECKSUM[:-1] + "1"}, "this actor's weights is"),
        ({"identity": ModelIdentity.of({**FILES, "config.json": b"other"})}, "this actor's model config is"),
        ({"identity": ModelIdentity.of({**FILES, "tokenizer.json": b"other"})}, "this actor's tokenizer is"),
    ],
    ids=["numbers", "weights", "config", "tokenizer"],
)
async def test_an_actor_that_differs_stops(difference: dict[str, Any], message: str) -> None:
    store = FakeCanaryStore()
    store.put_canary(canary_of().to_bytes(), fence=1)
    canary = actor_canary(store, **({"engine": Engine()} | difference))
    with pytest.raises(CanaryError, match=message):
        await canary.watch()
    assert not canary.is_admitted
    assert canary.counters()["canary_failures"] == 1


async def test_an_admitted_actor_that_drifts_is_found_by_the_next_comparison() -> None:
    store, engine = FakeCanaryStore(), Engine()
    store.put_canary(canary_of().to_bytes(), fence=1)
    canary = actor_canary(store, engine, every_s=1e-3)
    async with asyncio.timeout(30):
        watching = asyncio.create_task(canary.watch())
        while canary.counters()["canary_checks"] < 2:  # nobody doubts it
            await asyncio.sleep(0)
        assert canary.is_admitted
        engine.off_by = 1.9
        with pytest.raises(CanaryError, match="differs from the learner by"):
            await watching
    assert not canary.is_admitted
    assert canary.counters()["canary_failures"] == 1


def test_an_actor_is_compared_every_canary_minutes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = RunConfig.model_validate(
        {"model": {"path": "m"}, "task": {"kind": "arithmetic"}, "actor": {"canary_minutes": 2.5}}
    )
    canary = _canary(FakeCanaryStore(), Engine(), config, model_folder=tmp_path, checksum_of=lambda version: CHECKSUM)
    assert canary.every_s == 150


async def test_a_quantised_actor_has_its_own_tolerance() -> None:
    store = FakeCanaryStore()
    store.put_canary(canary_of(dtype="bfloat16").to_bytes(), fence=1)
    for dtype, is_admitted in {"bfloat16": False, "fp8": True}.items():
        canary = actor_canary(store, Engine(off_by=0.1, dtype=dtype))
        refused = pytest.raises(CanaryError, match=r"0\.05 and 0\.5 are allowed")
        with contextlib.nullcontext() if is_admitted else refused:
            await canary.compare()
        assert canary.is_admitted == is_admitted


async def test_an_actor_beyond_the_canary_asks_for_a_newer_one() -> None:
    store = FakeCanaryStore()
    store.put_canary(canary_of(3).to_bytes(), fence=1)
    comparing = asyncio.create_task(actor_canary(store, Engine(5)).compare())
    while not store.is_canary_asked():
        await asyncio.sleep(0)
    store.put_canary(canary_of(5).to_bytes(), fence=1)
    assert (await comparing).version == 5


async def test_scores_of_two_versions_are_not_compared() -> None:
    store, versions = FakeCanaryStore(), iter([4])
    store.put_canary(canary_of(3).to_bytes(), fence=1)

    def move_on() -> None:  # once, while the first row is scored; the numbers are wrong for both versions until then
        for version in versions:
            engine.policy_version = version
            store.put_canary(canary_of(4).to_bytes(), fence=1)

    engine = Engine(3, on_score=move_on)
    assert (await actor_canary(store, engine).compare()).version == 4


async def test_no_canary_in_time_is_an_error() -> None:
    with pytest.raises(CanaryError, match="is the learner alive"):
        await actor_canary(FakeCanaryStore(), Engine(), timeout_s=0.01).compare()


class TinyPolicy:
    """``ScoringPolicy`` on a real model."""

    device = torch.device("cpu")

    def __init__(self, *, seed: int = 0) -> None:
        self.model = tiny_model(seed=seed, vocab_size=200)

    @torch.no_grad()
    def logprobs(self, micro_batch: MicroBatch, *, temperature: float) -> torch.Tensor:
        return packed_logprobs(self.model, micro_batch, temperature=temperature)[0]


@pytest.fixture
def encoder(tmp_path: Path) -> PromptEncoder:
    path = tmp_path / "c.toml"
    path.write_text(
        '[model]\npath = "starter"\nmax_length = 128\n[task]\nkind = "arithmetic"\n[sampling]\nmax_tokens = 64'
    )
    config = load_config(path, (), environ={})
    return PromptEncoder(build_tokenizer(128), build_task(config), config)


ROWS_OF_TASK = [
    Row(prompt="1+2=", answer="3", solution="1+2=3"),
    Row(prompt="2+2=", answer="4"),
    Row(prompt="x", answer="5"),
]


def test_the_learner_scores_prompt_and_solution_as_the_model_alone_does(encoder: PromptEncoder) -> None:
    sequences = canary_sequences([ROWS_OF_TASK, ROWS_OF_TASK[1:]], encoder, build_tokenizer(128), max_tokens=3)
    assert [int(sequence.loss_mask.sum()) for sequence in sequences] == [3, 1, 1, 1]
    store, policy = FakeCanaryStore(), TinyPolicy()
    learner = LearnerCanary(store, policy, sequences, identity=IDENTITY, fence=1)
    assert learner.is_due(0)
    learner.publish(0, CHECKSUM, keyframe_version=0)
    assert not learner.is_due(7)  # dense updates: every version is a keyframe
    assert learner.is_due(8)
    store.ask_canary()
    assert learner.is_due(0)
    record = store.canary()
    assert record is not None
    for row in Canary.from_bytes(record).rows:
        ids = torch.tensor([[*row.prompt_ids, *row.completion_ids]])
        logprobs = torch.log_softmax(plain_logits(policy, ids), -1)
        expected = [float(logprobs[len(row.prompt_ids) + i - 1, token]) for i, token in enumerate(row.completion_ids)]
        assert list(row.logprobs) == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def plain_logits(policy: TinyPolicy, ids: torch.Tensor) -> torch.Tensor:
    """[L, V] of transformers' own attention."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_config(policy.model.config, attn_implementation="eager").eval()
    plain.load_state_dict(policy.model.state_dict())
    return plain(ids).logits[0]


def test_rows_without_a_reference_are_left_out(encoder: PromptEncoder) -> None:
    with pytest.raises(ConfigError, match="solution or answer"):
        canary_sequences([[Row(prompt="1+1=", answer="")]], encoder, build_tokenizer(128), max_tokens=8)
