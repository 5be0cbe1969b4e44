"""How long a sampler pauses for new weights, against vLLM's bare load of the same tensors.

    python -m benchmarks.weights.pause

A process of its own: vLLM wants its environment before anything is imported.
"""

# ruff: noqa: E402
from actors.environment import prepare_environment

prepare_environment()

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np

from actors.mirror import Mirror
from actors.vllm_engine import VllmEngine
from benchmarks.weights.updates import build_model
from lambdapo_async.config import RunConfig
from lambdapo_async.config.sections import SamplingConfig
from lambdapo_async.weights.catch_up import Available
from lambdapo_async.weights.delta_file import make_delta, write_full
from lambdapo_async.weights.state import State
from learner.character_tokenizer import build_tokenizer

RUN = "pause"
UPDATES, GROUPS, GROUP_SIZE = 16, 4, 8
MAX_LENGTH = 256
CHANGED_SHARE = 0.01


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="lp") as folder, ThreadPoolExecutor(1) as pool:
        print(json.dumps(asyncio.run(measure_pause(Path(folder), pool))))


async def measure_pause(scratch: Path, pool: ThreadPoolExecutor) -> Mapping[str, float]:
    """Seconds, median and smallest; every update changes all tensors, so that both load the same."""
    folder = scratch / "model"
    model = build_model()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    build_tokenizer(MAX_LENGTH).save_pretrained(folder)
    config = RunConfig.model_validate(
        {
            "model": {"path": str(folder), "max_length": MAX_LENGTH},
            "task": {"kind": "arithmetic"},
            "sampling": {"max_tokens": 200},
        }
    )
    engine = await VllmEngine.start(folder, config=config, scratch=scratch)
    try:
        return await _measure(engine, Mirror(scratch, run_id=RUN), _versions(model), pool)
    finally:
        await engine.shutdown()


def _versions(model: object) -> list[State]:
    tensors = {name: each.detach().bfloat16() for name, each in model.named_parameters()}  # type: ignore[attr-defined]
    states, rng = [State.of_torch(0, tensors)], np.random.default_rng(0)
    for version in range(1, UPDATES + 1):
        state = states[-1].copy()
        state.version = version
        for name, tensor in state.tensors.items():
            at = rng.choice(tensor.bits.size, max(1, int(CHANGED_SHARE * tensor.bits.size)), replace=False)
            tensor.bits[at] += 1
            state.forget_digest(name)
        states.append(state)
    return states


async def _measure(
    engine: VllmEngine, mirror: Mirror, states: list[State], pool: ThreadPoolExecutor
) -> Mapping[str, float]:
    mirror.advance(Available(version=0, num_bytes=0), write_full(states[0], run_id=RUN, pool=pool))
    await engine.load_weights(0, mirror.path)
    mirror.mark_loaded()
    names = list(states[0].tensors)
    bare, idle, busy = [], [], []
    for old, new in pairwise(states):
        started = time.monotonic()
        await engine._llm.collective_rpc("swap_weights", args=(str(mirror.path), names))
        bare.append(time.monotonic() - started)
        running = [asyncio.create_task(_sample(engine, index)) for index in range(GROUPS * (new.version % 2))]
        if running:
            await engine.sample_group([5], size=1, sampling=SamplingConfig(max_tokens=3))
        payload = make_delta(old, new, run_id=RUN, keyframe_version=0, pool=pool).to_bytes()
        mirror.advance(Available(version=new.version, num_bytes=len(payload), base_version=old.version), payload)
        pause_s = await engine.load_weights(new.version, mirror.path, changed=mirror.changed)
        mirror.mark_loaded()
        (busy if running else idle).append(pause_s)
        print(
            f"update {new.version} of {UPDATES}: paused {1000 * pause_s:.1f} ms, bare load {1000 * bare[-1]:.1f} ms",
            file=sys.stderr,
        )
        await engine.abort_all()
        await asyncio.gather(*running)
    measured = {"bare_load_s": bare, "pause_idle_s": idle, "pause_sampling_s": busy}
    result = {name: median(seconds) for name, seconds in measured.items()}
    result |= {f"{name}_min": min(seconds) for name, seconds in measured.items()}
    return result | {"pause_per_bare_load": result["pause_sampling_s"] / result["bare_load_s"]}


async def _sample(engine: VllmEngine, index: int) -> None:
    await engine.sample_group([5 + index], size=GROUP_SIZE, sampling=SamplingConfig(max_tokens=200))


if __name__ == "__main__":
    main()
