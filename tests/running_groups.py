"""Groups that an engine still samples while a test acts on it.

A real engine samples on while the test's process is not scheduled, and some seconds of that on a busy machine are more
than the longest completion takes. What a test then does comes too late, and it begins again.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import pytest

from actors.engine import Completion, InferenceEngine
from lambdapo_async.config.sections import SamplingConfig

T = TypeVar("T")


async def in_time(attempt: Callable[[], Awaitable[T | None]], *, num_attempts: int = 20) -> T:
    """The first result of ``attempt`` that is not None; None says that its requests ended before it acted on them."""
    for _ in range(num_attempts):
        result = await attempt()
        if result is not None:
            return result
    pytest.fail(f"the requests ended too early, {num_attempts} times")


async def running_groups(
    engine: InferenceEngine, prompts: Sequence[Sequence[int]], *, size: int, sampling: SamplingConfig
) -> list[asyncio.Task[tuple[Completion, ...]]]:
    """One group of each prompt, of which a token or more is sampled: a short one, sent after them, has come back.

    None of the tasks is done. Of a real engine this says no more than that nobody here has seen the end of a group.
    """

    async def start() -> list[asyncio.Task[tuple[Completion, ...]]] | None:
        tasks = [asyncio.create_task(engine.sample_group(prompt, size=size, sampling=sampling)) for prompt in prompts]
        await engine.sample_group(prompts[0], size=1, sampling=SamplingConfig(max_tokens=3))
        if not any(task.done() for task in tasks):
            return tasks
        await asyncio.gather(*tasks)
        return None

    return await in_time(start)
