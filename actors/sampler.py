"""From a prompt to all of its samples, in time or not at all."""

import asyncio
import time

from actors.continuation import continue_group
from actors.engine import Completion, InferenceEngine
from actors.meter import EngineMeter
from actors.prompts import Prompt
from actors.sampled import Sampled
from lambdapo_async.config import RunConfig
from lambdapo_async.errors import EngineError


class Sampler:
    """Asks the engine, and counts what it does in ``meter``."""

    def __init__(self, engine: InferenceEngine, meter: EngineMeter, config: RunConfig) -> None:
        self._engine, self._meter = engine, meter
        self._sampling, self._timeout_s = config.sampling, config.actor.group_timeout_s

    async def sample(self, prompt: Prompt, begun: Sampled | None) -> Sampled:
        """All samples of ``prompt``, from its beginning or from where another actor left them.

        Raises:
            EngineError: the engine is dead, or did not end in ``actor.group_timeout_s``.
        """
        started_at, started = time.time(), time.monotonic()
        try:
            async with asyncio.timeout(self._timeout_s):
                with self._meter.request():
                    completions = await self._completions(prompt, begun)
        except TimeoutError as error:
            raise EngineError(
                f"a group was not sampled within actor.group_timeout_s = {self._timeout_s:g} s"
            ) from error
        generation_s, num_old = time.monotonic() - started, 0
        if begun is not None:
            started_at, generation_s, num_old = begun.started_at, begun.generation_s + generation_s, begun.num_tokens
        sampled = Sampled(prompt=prompt, completions=completions, started_at=started_at, generation_s=generation_s)
        self._meter.count(len(completions), sampled.num_tokens - num_old)
        return sampled

    async def _completions(self, prompt: Prompt, begun: Sampled | None) -> tuple[Completion, ...]:
        prompt_ids = prompt.token_ids.tolist()
        if begun is not None:
            return await continue_group(self._engine, prompt_ids, begun.completions, sampling=self._sampling)
        return await self._engine.sample_group(prompt_ids, size=prompt.num_samples, sampling=self._sampling)
