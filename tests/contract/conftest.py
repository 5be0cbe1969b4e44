"""Fixtures of the contract tests: Redis itself, a run in it that is under way, and an engine of either kind."""

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
import redis

from actors.engine import InferenceEngine
from actors.scripted_engine import ScriptedEngine, bigram_script
from lambdapo_async.broker.connection import connect
from lambdapo_async.broker.redis_run import RedisRun
from tests.contract.broker_world import start
from tests.engine_fixtures import MAX_LENGTH, published_weights, tiny_config, write_weights
from tests.redis_fixtures import TIMEOUT_S

VOCAB_SIZE = 50


@pytest.fixture
def server(redis_url: str) -> Iterator[redis.Redis]:
    """Redis itself, behind the broker's back."""
    with contextlib.closing(connect(redis_url, timeout_s=TIMEOUT_S)) as client:
        yield client


@pytest.fixture
def started(redis_run: RedisRun) -> RedisRun:
    """``redis_run`` under way."""
    start(redis_run)
    return redis_run


@pytest_asyncio.fixture(
    scope="module", loop_scope="module", params=["scripted", pytest.param("vllm", marks=pytest.mark.engine)]
)
async def bare_engine(
    request: pytest.FixtureRequest, tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[InferenceEngine]:
    """An engine as it starts: without weights (until another test of the module gives it some)."""
    engine: InferenceEngine
    if request.param == "scripted":
        engine = ScriptedEngine(bigram_script(VOCAB_SIZE), eos_token_id=0, max_length=MAX_LENGTH)
    else:
        from actors.vllm_engine import VllmEngine

        scratch = tmp_path_factory.mktemp("s")
        engine = await VllmEngine.start(tiny_model_folder, config=tiny_config(tiny_model_folder), scratch=scratch)
    yield engine
    await engine.shutdown()


@pytest_asyncio.fixture(loop_scope="module")
async def engine(bare_engine: InferenceEngine, weights: Callable[[int], Path]) -> InferenceEngine:
    """The module's engine under version 1."""
    if bare_engine.policy_version != 1:
        await bare_engine.load_weights(1, weights(1))
    return bare_engine


@pytest.fixture(scope="module")
def weights(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    folder = tmp_path_factory.mktemp("weights")

    def file_of(version: int) -> Path:
        path = folder / f"{version}.safetensors"
        return path if path.exists() else write_weights(path, published_weights(tiny_model_folder, version))

    return file_of
