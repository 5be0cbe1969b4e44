"""What an engine promises in a run that trains adapters, asked of the scripted one and of the real one."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.engine import InferenceEngine
from actors.scripted_engine import ScriptedAdapterEngine, bigram_script
from lambdapo_async.config.learner import LoraConfig
from lambdapo_async.config.sections import SamplingConfig
from lambdapo_async.errors import WeightsError
from lambdapo_async.weights.adapter import PREFIX, adapter_shapes, target_linears
from tests.engine_fixtures import MAX_LENGTH, published_weights, reference_logprobs, tiny_config, tiny_model
from tests.engine_fixtures import write_weights as write
from tests.running_groups import running_groups

# vLLM warns a lot, in this process and in the one that it forks with our filters.
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.filterwarnings("default")]

LORA = LoraConfig(rank=3, alpha=6.0, target_modules=("q_proj", "up_proj", "down_proj"))
BASE = 7
PROMPT = [5, 6, 7, 20]
COMPLETION = [*range(3, 50), *range(45, 3, -1)]
TIMEOUT_S = 60.0


def adapters(folder: Path, version: int) -> dict[str, Tensor]:
    """Random ones: large enough that versions differ by whole nats."""
    model = tiny_model(folder, BASE)
    noise = torch.Generator().manual_seed(version)
    shapes = adapter_shapes(target_linears(model, LORA, head=model.get_output_embeddings()), LORA)
    return {name: (0.2 * torch.randn(shape, generator=noise)).bfloat16() for name, shape in shapes.items()}


def merged_model(folder: Path, version: int) -> PreTrainedModel:
    """W + alpha / rank B A, by another way than ours."""
    model, tensors = tiny_model(folder, BASE), adapters(folder, version)
    for name, down in tensors.items():
        if ".lora_A." in name:
            layer = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            up = tensors[name.replace(".lora_A.", ".lora_B.")]
            model.get_parameter(f"{layer}.weight").data.add_(6.0 / 3 * up.float() @ down.float())
    return model


@pytest_asyncio.fixture(
    scope="module", loop_scope="module", params=["scripted", pytest.param("vllm", marks=pytest.mark.engine)]
)
async def engine(
    request: pytest.FixtureRequest, tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[InferenceEngine]:
    engine: InferenceEngine
    if request.param == "scripted":
        engine = ScriptedAdapterEngine(bigram_script(50), eos_token_id=0, max_length=MAX_LENGTH)
    else:
        from actors.vllm_engine import VllmEngine

        plain = tiny_config(tiny_model_folder)
        config = plain.model_copy(update={"learner": plain.learner.model_copy(update={"lora": LORA})})
        engine = await VllmEngine.start(tiny_model_folder, config=config, scratch=tmp_path_factory.mktemp("s"))
    yield engine
    await engine.shutdown()


async def load(engine: InferenceEngine, folder: Path, version: int, path: Path, *, is_whole: bool = False) -> None:
    """As a mirror holds it: model and adapters in one file, of which only the adapters change after a keyframe."""
    tensors = adapters(folder, version)
    is_whole = is_whole or engine.policy_version < 0
    file = write(path, published_weights(folder, BASE) | tensors)
    await engine.load_weights(version, file, changed=None if is_whole else tensors.keys())


async def test_running_requests_end_under_the_version_they_began_with(
    engine: InferenceEngine, tiny_model_folder: Path, tmp_path: Path
) -> None:
    long = SamplingConfig(max_tokens=100)
    await load(engine, tiny_model_folder, 0, tmp_path / "0")
    old = await running_groups(engine, [[*PROMPT, i] for i in range(3)], size=6, sampling=long)
    await load(engine, tiny_model_folder, 1, tmp_path / "1")
    new = await engine.sample_group(PROMPT, size=6, sampling=long)
    async with asyncio.timeout(TIMEOUT_S):
        begun_before = [sample for group in await asyncio.gather(*old) for sample in group]
    assert {span.policy_version for sample in begun_before for span in sample.version_spans} == {0}
    assert {span.policy_version for sample in new for span in sample.version_spans} == {1}
    for sample in (*begun_before, *new):
        assert sum(span.num_tokens for span in sample.version_spans) == len(sample.token_ids)
    if not isinstance(engine, ScriptedAdapterEngine):
        for prompt_end, group in enumerate([task.result() for task in old]):
            model = merged_model(tiny_model_folder, 0)
            for sample in group:
                expected = reference_logprobs(model, [*PROMPT, prompt_end], sample.token_ids.tolist(), temperature=1.0)
                assert np.abs(sample.logprobs - expected).max() < 1e-3


async def test_scores_are_the_newest_versions(engine: InferenceEngine, tiny_model_folder: Path, tmp_path: Path) -> None:
    scores = []
    for version in (2, 3, 4, 5, 6, 7):  # more than vLLM holds at once
        is_whole = version == 5  # a keyframe in between, as after a learner's restart
        await load(engine, tiny_model_folder, version, tmp_path / str(version), is_whole=is_whole)
        assert engine.policy_version == version
        scores.append(await engine.score(PROMPT, COMPLETION))
        if not isinstance(engine, ScriptedAdapterEngine):
            model = merged_model(tiny_model_folder, version)
            expected = reference_logprobs(model, PROMPT, COMPLETION, temperature=1.0)
            assert np.abs(scores[-1] - expected).max() < 1e-4
    assert np.abs(scores[0] - scores[1]).max() > 1e-2


async def test_adapters_of_other_layers_are_refused(
    engine: InferenceEngine, tiny_model_folder: Path, tmp_path: Path
) -> None:
    await load(engine, tiny_model_folder, 8, tmp_path / "8")
    before = await engine.score(PROMPT, COMPLETION)
    tensors = published_weights(tiny_model_folder, BASE) | adapters(tiny_model_folder, 9)
    gone = tensors.popitem()
    with pytest.raises(WeightsError, match=f"1 tensors missing: {gone[0]}"):
        await engine.load_weights(9, write(tmp_path / "9", tensors))
    np.testing.assert_array_equal(await engine.score(PROMPT, COMPLETION), before)


@pytest.mark.engine
async def test_the_first_adapters_are_held_against_the_model(tiny_model_folder: Path, tmp_path: Path) -> None:
    from actors.published_shapes import published_shapes

    expected = published_shapes(tiny_model_folder, LORA)
    tensors = published_weights(tiny_model_folder, BASE) | adapters(tiny_model_folder, 1)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert len(published_shapes(tiny_model_folder, None)) == len(expected) - 2 * 3 * 2
