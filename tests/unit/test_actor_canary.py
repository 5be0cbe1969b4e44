"""The actor's canary: an engine that differs from the learner's policy is not admitted."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.canary import ActorCanary
from actors.engine import EngineInfo
from actors.session import _canary
from lambdapo_async.config import RunConfig
from lambdapo_async.weights.canary import CanaryError, ModelIdentity
from lambdapo_async.weights.canary_store import CanaryStore
from tests.canaries import CHECKSUM, FILES, IDENTITY, ROWS, canary_of
from tests.fakes_canary import FakeCanaryStore


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
