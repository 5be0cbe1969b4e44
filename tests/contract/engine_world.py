"""What the engine's contract tests share: its prompt, requests that run, and files of another model."""

import asyncio
from collections.abc import Callable

import torch
from torch import Tensor

from actors.engine import Completion, InferenceEngine
from lambdapo_async.config.sections import SamplingConfig
from tests.running_groups import in_time, running_groups

PROMPT = [5, 6, 7, 20]
SAMPLING = SamplingConfig(max_tokens=100)

Damage = Callable[[dict[str, Tensor]], dict[str, Tensor]]


async def running(
    engine: InferenceEngine, *, groups: int = 4, size: int = 8
) -> list[asyncio.Task[tuple[Completion, ...]]]:
    """Long requests that have begun and not ended, see :func:`running_groups`."""
    return await running_groups(engine, [[*PROMPT, i] for i in range(groups)], size=size, sampling=SAMPLING)


async def aborted_groups(engine: InferenceEngine, *, groups: int = 4) -> list[tuple[Completion, ...]]:
    """Groups of which an abort cut samples off."""

    async def abort() -> list[tuple[Completion, ...]] | None:
        tasks = await running(engine, groups=groups)
        await engine.abort_all()
        aborted = await asyncio.gather(*tasks)
        is_cut = any(one.finish_reason == "abort" and len(one.token_ids) > 0 for group in aborted for one in group)
        return aborted if is_cut else None

    return await in_time(abort)


def versions(completion: Completion) -> list[int]:
    return [span.policy_version for span in completion.version_spans]


def with_tensor(name: str, tensor: Tensor) -> Damage:
    return lambda tensors: {**tensors, name: tensor}


NORM = "model.norm.weight"


def with_nan(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    damaged = tensors[NORM].clone()
    damaged[7] = torch.nan
    return {**tensors, NORM: damaged}
