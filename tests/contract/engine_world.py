"""What the engine's contract tests share: its prompt, requests that run, and files of another model."""

import asyncio
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from actors.engine import Completion, InferenceEngine
from lambdapo_async.config.sections import SamplingConfig

PROMPT = [5, 6, 7, 20]
SAMPLING = SamplingConfig(max_tokens=100)

Damage = Callable[[dict[str, Tensor]], dict[str, Tensor]]


async def running(
    engine: InferenceEngine, *, groups: int = 4, size: int = 8
) -> list[asyncio.Task[tuple[Completion, ...]]]:
    """Long requests of which a token or more is sampled: a short one, started after them, has come back."""
    tasks = [
        asyncio.create_task(engine.sample_group([*PROMPT, i], size=size, sampling=SAMPLING)) for i in range(groups)
    ]
    await engine.sample_group(PROMPT, size=1, sampling=SamplingConfig(max_tokens=3))
    return tasks


async def aborted_groups(engine: InferenceEngine, *, groups: int = 4) -> list[tuple[Completion, ...]]:
    """Groups of which an abort cut samples off. On a busy machine all may have ended before it: then once more."""
    for _ in range(20):
        tasks = await running(engine, groups=groups)
        await engine.abort_all()
        aborted = await asyncio.gather(*tasks)
        if any(one.finish_reason == "abort" and len(one.token_ids) > 0 for group in aborted for one in group):
            return aborted
    pytest.fail("no abort came before the samples had ended")


def versions(completion: Completion) -> list[int]:
    return [span.policy_version for span in completion.version_spans]


def with_tensor(name: str, tensor: Tensor) -> Damage:
    return lambda tensors: {**tensors, name: tensor}


NORM = "model.norm.weight"


def with_nan(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    damaged = tensors[NORM].clone()
    damaged[7] = torch.nan
    return {**tensors, NORM: damaged}
