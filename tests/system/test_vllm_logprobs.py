"""Every log-probability that vLLM reports, against transformers under the weights that must have produced it."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from actors.continuation import continue_group
from actors.engine import Completion
from actors.scripted_engine import sampling_logprobs
from actors.vllm_engine import VllmEngine
from lambdapo_async.config.sections import SamplingConfig
from lambdapo_async.errors import WeightsError
from tests.engine_fixtures import published_weights, reference_logprobs, tiny_config, tiny_model, write_weights
from tests.running_groups import in_time, running_groups

# vLLM warns a lot, in this process and in the one that it forks with our filters.
pytestmark = [
    pytest.mark.engine,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings("default"),
]

PROMPTS = [[5, 6, 7, 20 + i] for i in range(4)]
FLOAT32_MAX = 1e-3
BFLOAT16_MEAN = 0.05


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tied(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VllmEngine]:
    """float32, tied embeddings, no weights yet."""
    scratch = tmp_path_factory.mktemp("s")
    engine = await VllmEngine.start(tiny_model_folder, config=tiny_config(tiny_model_folder), scratch=scratch)
    yield engine
    await engine.shutdown()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def untied(untied_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VllmEngine]:
    """bfloat16, an output layer of its own, no weights yet."""
    scratch = tmp_path_factory.mktemp("s")
    config = tiny_config(untied_model_folder, dtype="bfloat16")
    engine = await VllmEngine.start(untied_model_folder, config=config, scratch=scratch)
    yield engine
    await engine.shutdown()


async def load(engine: VllmEngine, folder: Path, version: int, tmp_path: Path) -> PreTrainedModel:
    """Give the engine the weights of ``version``; the same model as transformers sees it."""
    path = write_weights(tmp_path / f"{version}.safetensors", published_weights(folder, version))
    assert await engine.load_weights(version, path) > 0
    path.unlink()
    return tiny_model(folder, version)


async def sample(engine: VllmEngine, sampling: SamplingConfig) -> list[tuple[list[int], Completion]]:
    groups = await asyncio.gather(*[engine.sample_group(prompt, size=8, sampling=sampling) for prompt in PROMPTS])
    return [(prompt, completion) for prompt, group in zip(PROMPTS, groups, strict=True) for completion in group]


def gaps(
    model: PreTrainedModel, samples: Sequence[tuple[list[int], Completion]], *, temperature: float
) -> NDArray[np.float32]:
    """|vLLM - transformers| in nats, over all tokens of the samples."""
    return np.concatenate(
        [
            np.abs(c.logprobs - reference_logprobs(model, prompt, c.token_ids.tolist(), temperature=temperature))
            for prompt, c in samples
        ]
    )


async def test_the_first_file_must_hold_every_parameter_of_the_model(
    tied: VllmEngine, tiny_model_folder: Path, tmp_path: Path
) -> None:
    """Else the tensors it leaves out would stay random, silently."""
    assert tied.policy_version == -1
    good = published_weights(tiny_model_folder, 0)
    norm = "model.layers.1.input_layernorm.weight"
    bad = {
        f"1 tensors missing: {norm}": {name: tensor for name, tensor in good.items() if name != norm},
        "1 tensors unknown to this model: lm_head.weight": {**good, "lm_head.weight": torch.ones(2, 2)},
        rf"{norm} is \[64\], this model's is \[128\]": {**good, norm: torch.ones(64)},
    }
    for message, tensors in bad.items():
        with pytest.raises(WeightsError, match=message):
            await tied.load_weights(0, write_weights(tmp_path / "bad.safetensors", tensors))
    assert tied.policy_version == -1


async def test_float32_is_transformers_after_every_update(
    tied: VllmEngine, tiny_model_folder: Path, tmp_path: Path
) -> None:
    """With tied embeddings: without repacking, the output layer stays that of the dummy weights, nats away."""
    for version in (0, 1):
        model = await load(tied, tiny_model_folder, version, tmp_path)
        for temperature in (1.0, 0.7):
            samples = await sample(tied, SamplingConfig(max_tokens=40, temperature=temperature))
            assert gaps(model, samples, temperature=temperature).max() < FLOAT32_MAX


async def test_bfloat16_is_near_transformers_after_every_update(
    untied: VllmEngine, untied_model_folder: Path, tmp_path: Path
) -> None:
    for version in (0, 1):
        model = await load(untied, untied_model_folder, version, tmp_path)
        for temperature in (1.0, 0.7):
            samples = await sample(untied, SamplingConfig(max_tokens=40, temperature=temperature))
            assert gaps(model, samples, temperature=temperature).mean() < BFLOAT16_MEAN


async def test_a_continued_sample_is_transformers_under_the_weights_of_each_part(
    tied: VllmEngine, tiny_model_folder: Path, tmp_path: Path
) -> None:
    """As between two actors: cut off under one version, prefilled and sampled on under the next."""
    sampling = SamplingConfig(max_tokens=100, temperature=0.7)
    models = {1: await load(tied, tiny_model_folder, 1, tmp_path)}

    async def cut() -> list[tuple[Completion, ...]] | None:
        tasks = await running_groups(tied, PROMPTS, size=8, sampling=sampling)
        await tied.abort_all()
        groups = await asyncio.gather(*tasks)
        num_cut = sum(len(c.token_ids) > 0 and c.finish_reason == "abort" for group in groups for c in group)
        return groups if num_cut >= 4 else None

    cut_off = await in_time(cut)
    models[2] = await load(tied, tiny_model_folder, 2, tmp_path)
    num_continued = 0
    for prompt, partials in zip(PROMPTS, cut_off, strict=True):
        for whole in await continue_group(tied, prompt, partials, sampling=sampling):
            spans = whole.version_spans
            versions = np.repeat([span.policy_version for span in spans], [span.num_tokens for span in spans])
            num_continued += len(spans) == 2
            for version, model in models.items():
                gap = np.abs(
                    whole.logprobs - reference_logprobs(model, prompt, whole.token_ids.tolist(), temperature=0.7)
                )
                assert (gap[versions == version] < FLOAT32_MAX).all()
    assert num_continued >= 4


@pytest.mark.parametrize("truncation", [{"top_p": 0.7}, {"top_k": 5}, {"top_k": 8, "top_p": 0.8}], ids=str)
async def test_truncated_sampling_reports_the_truncated_distribution(
    tied: VllmEngine, tiny_model_folder: Path, tmp_path: Path, truncation: dict[str, float]
) -> None:
    model = await load(tied, tiny_model_folder, 1, tmp_path)
    sampling = SamplingConfig.model_validate({"temperature": 0.8, "max_tokens": 20, **truncation})
    for prompt, completion in await sample(tied, sampling):
        ids = completion.token_ids.tolist()
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].double().numpy()
        expected = [sampling_logprobs(row, sampling)[token] for row, token in zip(logits, ids, strict=True)]
        assert np.allclose(completion.logprobs, expected, atol=FLOAT32_MAX)


def is_across(completion: Completion) -> bool:
    """Sampled under three versions, and long enough under each for it to differ from the others."""
    return len(completion.version_spans) == 3 and all(span.num_tokens >= 4 for span in completion.version_spans)


async def test_each_token_has_the_version_that_sampled_it(
    tied: VllmEngine, tiny_model_folder: Path, tmp_path: Path
) -> None:
    """Recorded log-probabilities are those of the tagged version given the whole context, and of no other version."""
    paths = [tmp_path / f"{version}.safetensors" for version in (1, 2, 3)]
    for version, path in enumerate(paths, start=1):
        write_weights(path, published_weights(tiny_model_folder, version))

    async def update_twice() -> list[tuple[Completion, ...]] | None:
        await tied.load_weights(1, paths[0])
        tasks = await running_groups(tied, PROMPTS, size=8, sampling=SamplingConfig(max_tokens=100))
        await tied.load_weights(2, paths[1])
        await tied.sample_group(PROMPTS[0], size=1, sampling=SamplingConfig(max_tokens=5, top_k=1))
        await tied.load_weights(3, paths[2])
        groups = await asyncio.gather(*tasks)
        return groups if any(is_across(c) for group in groups for c in group) else None

    groups = await in_time(update_twice)
    samples = [(prompt, c) for prompt, group in zip(PROMPTS, groups, strict=True) for c in group]
    models = {version: tiny_model(tiny_model_folder, version) for version in (1, 2, 3)}
    for prompt, completion in samples:
        spans = completion.version_spans
        versions = np.repeat([span.policy_version for span in spans], [span.num_tokens for span in spans])
        under = {
            version: np.abs(
                completion.logprobs - reference_logprobs(model, prompt, completion.token_ids.tolist(), temperature=1.0)
            )
            for version, model in models.items()
        }
        for version in models:
            assert (under[version][versions == version] < FLOAT32_MAX).all()
        if is_across(completion):
            for version in models:
                assert under[version][versions != version].mean() > 0.3
