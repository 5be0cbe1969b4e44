"""What is left when the engine's process, or the one that holds it, is killed."""

import asyncio
import gc
import multiprocessing
import os
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest
from vllm.v1.engine.async_llm import AsyncLLM

from actors.engine import Completion
from actors.vllm_engine import Engine, VllmEngine
from lambdapo_async.config.sections import SamplingConfig
from lambdapo_async.errors import EngineError
from tests.engine_fixtures import published_weights, tiny_config, write_weights
from tests.running_groups import in_time, running_groups

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("default")]

LONG = SamplingConfig(max_tokens=100)
PROMPTS = [[5, 6, i] for i in range(4)]
EVENT_TIMEOUT_S = 30.0
Group = tuple[Completion, ...]


@asynccontextmanager
async def sampling_engine(folder: Path) -> AsyncIterator[VllmEngine]:
    with tempfile.TemporaryDirectory(prefix="s") as scratch:
        engine = await VllmEngine.start(folder, config=tiny_config(folder), scratch=Path(scratch))
        try:
            await engine.load_weights(0, write_weights(Path(scratch) / "w", published_weights(folder, 0)))
            yield engine
        finally:
            await engine.shutdown()


async def paused_requests(engine: VllmEngine) -> tuple[list[asyncio.Task[Group]], list[asyncio.Task[Group]]]:
    """Groups that were being sampled as the engine paused, and groups that came after it and so cannot end."""
    begun = await running_groups(engine, PROMPTS, size=8, sampling=LONG)
    await engine._llm.pause_generation(mode="keep", clear_cache=False)
    waiting = [asyncio.create_task(engine.sample_group(prompt, size=8, sampling=LONG)) for prompt in PROMPTS]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    return begun, waiting


def assert_failed(begun: Sequence[Group | BaseException], waiting: Sequence[Group | BaseException]) -> None:
    """Every request, except that on a busy machine groups may have ended, as they ought to, before the pause."""
    assert [type(result) for result in waiting] == [EngineError] * len(PROMPTS)
    for result in begun:
        assert isinstance(result, EngineError) or {c.finish_reason for c in result} <= {"stop", "length"}


async def test_a_killed_engine_process_fails_every_request(tiny_model_folder: Path, tmp_path: Path) -> None:
    before = set(psutil.Process().children())
    async with sampling_engine(tiny_model_folder) as engine:
        (core,) = set(psutil.Process().children()) - before
        assert os.getpgid(core.pid) == core.pid, "Ctrl-C in the actor's terminal must not reach the engine"
        begun, waiting = await paused_requests(engine)
        core.kill()
        async with asyncio.timeout(EVENT_TIMEOUT_S):
            results = await asyncio.gather(*begun, *waiting, return_exceptions=True)
        assert_failed(results[: len(begun)], results[len(begun) :])
        with pytest.raises(EngineError, match="dead"):
            await engine.sample_group([5, 6], size=1, sampling=LONG)
        weights = write_weights(tmp_path / "w", published_weights(tiny_model_folder, 1))
        with pytest.raises(EngineError, match="dead"):
            await engine.load_weights(1, weights)
        assert engine.policy_version == 0


async def test_a_terminated_engine_process_finishes_what_runs(tiny_model_folder: Path) -> None:
    """Some schedulers send SIGTERM to every process; the actor then drains, and its engine must let it."""

    async def drain() -> list[Group] | None:
        before = set(psutil.Process().children())
        async with sampling_engine(tiny_model_folder) as engine:
            (core,) = set(psutil.Process().children()) - before
            tasks = await running_groups(engine, PROMPTS, size=8, sampling=LONG)
            core.terminate()
            try:
                async with asyncio.timeout(EVENT_TIMEOUT_S):
                    return await asyncio.gather(*tasks)
            except EngineError:  # it ended with its last group, and we may not have read that by then
                return None

    groups = await in_time(drain, num_attempts=3)
    assert {c.finish_reason for group in groups for c in group} <= {"stop", "length"}


async def test_a_failed_swap_kills_the_engine(tiny_model_folder: Path, tmp_path: Path) -> None:
    """After it the model may be half loaded and must not sample again."""
    weights = write_weights(tmp_path / "w", published_weights(tiny_model_folder, 1))
    async with sampling_engine(tiny_model_folder) as engine:
        with weights.open("rb") as file:
            only_we_can_open_it = Path(f"/proc/self/fd/{file.fileno()}")
            begun, waiting = await paused_requests(engine)
            async with asyncio.timeout(EVENT_TIMEOUT_S):
                with pytest.raises(EngineError, match="version 1 failed"):
                    await engine.load_weights(1, only_we_can_open_it)
                results = await asyncio.gather(*begun, *waiting, return_exceptions=True)
        assert_failed(results[: len(begun)], results[len(begun) :])
        with pytest.raises(EngineError, match="version 1 failed"):
            await engine.sample_group([5, 6], size=1, sampling=LONG)
        assert engine.policy_version == 0


def _hold_an_engine(folder: Path, ready: Connection) -> None:
    async def hold() -> None:
        async with sampling_engine(folder):
            ready.send([child.pid for child in psutil.Process().children(recursive=True)])
            await asyncio.Event().wait()

    asyncio.run(hold())


def test_a_killed_holder_leaves_no_process(tiny_model_folder: Path) -> None:
    ours, theirs = multiprocessing.Pipe()
    holder = multiprocessing.get_context("fork").Process(target=_hold_an_engine, args=(tiny_model_folder, theirs))
    holder.start()
    try:
        assert ours.poll(EVENT_TIMEOUT_S), "the engine did not start"
        children = [psutil.Process(pid) for pid in ours.recv()]
        assert children, "the engine runs in a process of its own"
    finally:
        holder.kill()
        holder.join()
    _, alive = psutil.wait_procs(children, timeout=EVENT_TIMEOUT_S)
    for process in alive:
        process.kill()
    assert not alive, f"orphans of {os.getpid()}'s child: {alive}"


def test_an_engine_that_is_freed_ends_nothing_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """At exit vLLM's modules are gone before its engines: their own end was a traceback below every actor's log."""
    ended: list[object] = []
    monkeypatch.setattr(AsyncLLM, "shutdown", ended.append)
    engine = Engine.__new__(Engine)
    del engine
    gc.collect()
    assert ended == []
