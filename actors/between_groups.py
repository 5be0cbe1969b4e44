"""New weights that wait for running groups: every group is of one version, at the price of an engine that runs dry."""

import asyncio
from collections.abc import Sequence, Set
from pathlib import Path

from actors.engine import Completion, EngineInfo, InferenceEngine
from lambdapo_async.config.sections import ActorConfig, SamplingConfig
from lambdapo_async.rollout import LogProbs


def updating_as(config: ActorConfig, engine: InferenceEngine) -> InferenceEngine:
    """``engine``, taking new weights when ``actor.update_mode`` says."""
    return BetweenGroups(engine) if config.update_mode == "between_groups" else engine


class BetweenGroups:
    """``InferenceEngine`` around another one: an update waits until nothing runs, and nothing starts meanwhile."""

    def __init__(self, engine: InferenceEngine) -> None:
        self._engine = engine
        self._num_running = 0
        self._idle, self._open = asyncio.Event(), asyncio.Event()
        self._idle.set()
        self._open.set()

    @property
    def info(self) -> EngineInfo:
        """Name, device and dtype."""
        return self._engine.info

    @property
    def policy_version(self) -> int:
        """Version of the weights loaded last; -1 before the first."""
        return self._engine.policy_version

    async def sample_group(
        self, prompt_ids: Sequence[int], *, size: int, sampling: SamplingConfig, seed: int | None = None
    ) -> tuple[Completion, ...]:
        """See :meth:`actors.engine.InferenceEngine.sample_group`; waits while an update does."""
        while not self._open.is_set():
            await self._open.wait()
        self._num_running += 1
        self._idle.clear()
        try:
            return await self._engine.sample_group(prompt_ids, size=size, sampling=sampling, seed=seed)
        finally:
            self._num_running -= 1
            if self._num_running == 0:
                self._idle.set()

    async def score(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> LogProbs:
        """See :meth:`actors.engine.InferenceEngine.score`."""
        return await self._engine.score(prompt_ids, completion_ids)

    async def load_weights(self, version: int, path: Path, *, changed: Set[str] | None = None) -> float:
        """See :meth:`actors.engine.InferenceEngine.load_weights`; waits as long as the groups' own deadlines let it."""
        self._open.clear()
        try:
            await self._idle.wait()
            return await self._engine.load_weights(version, path, changed=changed)
        finally:
            self._open.set()

    async def abort_all(self) -> None:
        """See :meth:`actors.engine.InferenceEngine.abort_all`."""
        await self._engine.abort_all()

    async def shutdown(self) -> None:
        """See :meth:`actors.engine.InferenceEngine.shutdown`."""
        await self._engine.shutdown()
