"""Actor and learner see the same starter model: vLLM's recorded log mu against the learner's own packed log pi."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from actors.engine import Completion
from actors.vllm_engine import VllmEngine
from lambdapo_async.config import RunConfig, load_config
from lambdapo_async.packing import TrainingSequence, pack
from lambdapo_async.tasks.prompts import PromptEncoder
from lambdapo_async.tasks.registry import build_task
from lambdapo_async.weights.canary import TOLERANCES
from lambdapo_async.weights.delta_file import write_full
from lambdapo_async.weights.state import State
from learner.policy import Policy
from learner.starter import ensure_starter
from tests.system.test_run import DEMO
from tests.weight_states import POOL

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("default"), pytest.mark.timeout(300)]

NUM_PROMPTS, GROUP_SIZE = 16, 8


def training_sequence(prompt: Sequence[int], completion: Completion) -> TrainingSequence:
    padding = np.zeros(len(prompt))
    return TrainingSequence(
        token_ids=np.concatenate([prompt, completion.token_ids]).astype(np.int32),
        loss_mask=np.arange(len(prompt) + len(completion.token_ids)) >= len(prompt),
        behavior_logprobs=np.concatenate([padding, completion.logprobs]).astype(np.float32),
        advantage=0.0,
        token_versions=np.zeros(len(prompt) + len(completion.token_ids), np.int64),
        group_key="",
    )


async def sampled(config: RunConfig, policy: Policy, prompts: list[list[int]], folder: Path) -> list[TrainingSequence]:
    model_dir = folder / "model"
    model_dir.mkdir()
    for name, content in policy.model_files.items():
        (model_dir / name).write_bytes(content)
    payload = folder / "0.safetensors"
    payload.write_bytes(write_full(State.of_torch(0, dict(policy.named_bf16())), run_id="x", pool=POOL))
    engine = await VllmEngine.start(model_dir, config=config, scratch=folder)
    try:
        await engine.load_weights(0, payload)
        groups = await asyncio.gather(
            *(engine.sample_group(prompt, size=GROUP_SIZE, sampling=config.sampling) for prompt in prompts)
        )
    finally:
        await engine.shutdown()
    return [training_sequence(p, c) for p, group in zip(prompts, groups, strict=True) for c in group]


@pytest.mark.parametrize(
    ("overrides", "mean", "largest"),
    [
        (["actor.dtype=float32"], 1e-4, 1e-2),
        (["actor.dtype=bfloat16"], 0.02, 1.0),
        (["actor.dtype=bfloat16", "actor.quantization=fp8_per_channel"], TOLERANCES["fp8"].mean, 4.0),
    ],
    ids=["float32", "bfloat16", "fp8"],
)
async def test_engine_and_learner_agree_on_the_starter(
    overrides: list[str], mean: float, largest: float, output_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = load_config(DEMO, [f"output_dir={output_dir}", *overrides], environ={})
    task = build_task(config)
    model_path = ensure_starter(config, task)
    policy = Policy.load(model_path, revision=None, config=config.learner, temperature=1.0, device=torch.device("cpu"))
    encoder = PromptEncoder(AutoTokenizer.from_pretrained(model_path), task, config)
    prompts = [encoder.encode(row) for row in task.heldout_rows()[:NUM_PROMPTS]]
    sequences = await sampled(config, policy, prompts, tmp_path_factory.mktemp("s"))
    gaps = []
    for micro_batch in pack(sequences, token_budget=config.learner.micro_batch_tokens):
        difference = policy.logprobs(micro_batch) - micro_batch.behavior_logprobs_T
        gaps.append(difference[micro_batch.loss_mask_T].abs())
    gap = torch.cat(gaps)
    assert len(gap) > NUM_PROMPTS * GROUP_SIZE * 10
    assert gap.mean() < mean
    assert gap.max() < largest
