"""An actor's engine as its config asks for it: when it takes new weights, and how long a group may take."""

import asyncio

import numpy as np
import pytest

from actors.between_groups import BetweenGroups, updating_as
from actors.meter import EngineMeter
from actors.prompts import Prompt
from actors.sampler import Sampler
from actors.scripted_engine import ScriptedEngine, bigram_script
from lambdapo_async.config import RunConfig
from lambdapo_async.config.sections import ActorConfig
from lambdapo_async.errors import EngineError
from lambdapo_async.tasks.interface import Row


class HungEngine:
    async def sample_group(self, *_: object, **__: object) -> None:
        await asyncio.Event().wait()


async def test_an_engine_that_hangs_is_an_error_that_names_the_deadline() -> None:
    config = RunConfig.model_validate(
        {"model": {"path": "m"}, "task": {"kind": "arithmetic"}, "actor": {"group_timeout_s": 0.01}}
    )
    prompt = Prompt(Row(prompt="1 2", answer="3"), np.array([1, 2], np.int32), num_samples=2)
    with pytest.raises(EngineError, match=r"not sampled within actor\.group_timeout_s = 0\.01 s"):
        await Sampler(HungEngine(), EngineMeter(), config).sample(prompt, None)


def test_the_update_mode_is_the_configs() -> None:
    engine = ScriptedEngine(bigram_script(4), eos_token_id=0, max_length=8)
    assert updating_as(ActorConfig(), engine) is engine
    assert isinstance(updating_as(ActorConfig(update_mode="between_groups"), engine), BetweenGroups)
