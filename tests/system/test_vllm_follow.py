"""The real engine behind a chain of deltas: its log-probabilities against transformers on the learner's own state."""

from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from actors.engine import Completion
from actors.mirror import Mirror
from actors.vllm_engine import VllmEngine
from lambdapo_async.config.sections import SamplingConfig
from lambdapo_async.errors import EngineError
from lambdapo_async.weights.canary import TOLERANCES
from lambdapo_async.weights.catch_up import Available
from lambdapo_async.weights.delta_file import make_delta, write_full
from lambdapo_async.weights.state import State
from tests.engine_fixtures import published_weights, reference_logprobs, tiny_config, write_weights
from tests.running_groups import in_time, running_groups

# vLLM warns a lot, in this process and in the one that it forks with our filters.
pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("default")]

RUN = "chain"
POOL = ThreadPoolExecutor(1)
PROMPT = [5, 6, 7, 20]
COMPLETION = [*range(3, 50), *range(45, 3, -1)]
Change = Callable[[dict[str, Tensor]], None]


def sparse(tensors: dict[str, Tensor]) -> None:
    """A tenth of every tensor, as an optimizer step does it."""
    for tensor in tensors.values():
        tensor += (torch.rand_like(tensor) < 0.1) * 0.1 * torch.randn_like(tensor)


def of(name: str) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] += 0.1 * torch.randn_like(tensors[name])

    return change


CHAIN: dict[str, Change] = {
    "everything": sparse,
    "one part of a fused tensor": of("model.layers.1.self_attn.q_proj.weight"),
    "another": of("model.layers.0.mlp.up_proj.weight"),
    "the tied embeddings": of("model.embed_tokens.weight"),
    "the last norm": of("model.norm.weight"),
    "a norm within a layer": of("model.layers.0.self_attn.k_norm.weight"),
    "everything again": sparse,
}


def model_of(folder: Path, tensors: dict[str, Tensor]) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(Qwen3Config.from_pretrained(folder), dtype=torch.float32)
    missing, unknown = model.load_state_dict({name: each.float() for name, each in tensors.items()}, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unknown
    model.tie_weights()
    return model.eval()


@asynccontextmanager
async def started(folder: Path, scratch: Path, **actor: object) -> AsyncIterator[VllmEngine]:
    config = tiny_config(folder)
    config = config.model_copy(update={"actor": config.actor.model_copy(update=actor)})
    engine = await VllmEngine.start(folder, config=config, scratch=scratch)
    try:
        yield engine
    finally:
        await engine.shutdown()


async def follow(
    engine: VllmEngine,
    scratch: Path,
    weights: dict[str, Tensor],
    at_each: Callable[[dict[str, Tensor]], None] = lambda _: None,
) -> list[NDArray[np.float32]]:
    """Scores at the first version and after each delta of ``CHAIN``; ``weights`` (float32) end at the last.

    Args:
        at_each: called with the state of every version but the first.
    """
    mirror = Mirror(scratch, run_id=RUN)
    state = State.of_torch(0, {name: tensor.bfloat16() for name, tensor in weights.items()})
    mirror.advance(Available(version=0, num_bytes=0), write_full(state, run_id=RUN, pool=POOL))
    await engine.load_weights(0, mirror.path, changed=mirror.changed)
    mirror.mark_loaded()
    scores = [await engine.score(PROMPT, COMPLETION)]
    for change in CHAIN.values():
        change(weights)
        bfloat16 = {name: tensor.bfloat16() for name, tensor in weights.items()}
        old, state = state, State.of_torch(state.version + 1, bfloat16)
        payload = make_delta(old, state, run_id=RUN, keyframe_version=0, pool=POOL).to_bytes()
        mirror.advance(Available(version=state.version, num_bytes=0, base_version=old.version), payload)
        await engine.load_weights(state.version, mirror.path, changed=mirror.changed)
        mirror.mark_loaded()
        at_each(bfloat16)
        scores.append(await engine.score(PROMPT, COMPLETION))
    return scores


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
async def test_after_every_delta_the_engine_is_transformers_on_the_same_state(
    tied: bool, tiny_model_folder: Path, untied_model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Deltas that touch everything, one layer, or a part of a fused tensor, whose other parts must stay."""
    folder = tiny_model_folder if tied else untied_model_folder
    scratch = tmp_path_factory.mktemp("s")
    weights = {name: tensor.float() for name, tensor in published_weights(folder, 0).items()}
    expected: list[NDArray[np.float32]] = []

    def remember(state: dict[str, Tensor]) -> None:
        expected.append(reference_logprobs(model_of(folder, state), PROMPT, COMPLETION, temperature=1.0))

    async with started(folder, scratch) as engine:
        followed = await follow(engine, scratch, weights, remember)
    for what, after, before, exact in zip(CHAIN, followed[1:], followed, expected, strict=False):
        assert np.abs(after - exact).max() < 1e-4, what
        assert np.abs(after - before).max() > 1e-2, f"{what} changed nothing"


async def test_a_quantised_engine_is_after_every_delta_what_it_would_be_had_it_begun_there(
    tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The parts that a delta does not touch keep their scales, the others get new ones."""
    folder, scratch = tiny_model_folder, tmp_path_factory.mktemp("s")
    as_fp8 = {"dtype": "bfloat16", "quantization": "fp8_per_channel"}
    weights = {name: tensor.float() for name, tensor in published_weights(folder, 0).items()}
    async with started(folder, scratch, **as_fp8) as engine:
        assert engine.info.dtype == "fp8"
        followed = await follow(engine, scratch, weights)
    last = write_weights(scratch / "last", {name: tensor.bfloat16() for name, tensor in weights.items()})
    async with started(folder, scratch, **as_fp8) as engine:
        await engine.load_weights(0, last)
        assert np.array_equal(await engine.score(PROMPT, COMPLETION), followed[-1])
    for what, after, before in zip(CHAIN, followed[1:], followed, strict=False):
        assert np.abs(after - before).max() > 1e-2, f"{what} changed nothing"
    exact = reference_logprobs(model_of(folder, weights), PROMPT, COMPLETION, temperature=1.0)
    assert np.abs(followed[-1] - exact).mean() > TOLERANCES["bfloat16"].mean, "nothing was quantised"


async def test_parameters_that_a_load_leaves_out_kill_the_engine(
    tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Nothing samples on from a layer of which a part is garbage, though nobody resolved its name."""
    scratch = tmp_path_factory.mktemp("s")
    async with started(tiny_model_folder, scratch) as engine:
        tensors = published_weights(tiny_model_folder, 0)
        path = write_weights(scratch / "0", tensors)
        await engine.load_weights(0, path)
        names = [name for name in tensors if name != "model.layers.0.mlp.down_proj.weight"]
        with pytest.raises(EngineError, match=r"left parameters without weights: \['model\.layers\.0\.mlp\.down_proj"):
            await engine._swap(1, path, names)
        with pytest.raises(EngineError, match="the engine is dead"):
            await engine.sample_group(PROMPT, size=1, sampling=SamplingConfig(max_tokens=3))


def is_across(sample: Completion) -> bool:
    """Sampled under two versions, and long enough under the second for its context to show."""
    return len(sample.version_spans) == 2 and sample.version_spans[1].num_tokens >= 4


async def test_with_stale_kv_running_groups_keep_their_context_and_new_ones_see_none_of_it(
    tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, scratch = tiny_model_folder, tmp_path_factory.mktemp("s")
    prompt = [5 + i % 40 for i in range(70)]  # two whole blocks that a later request would find in the cache
    async with started(folder, scratch, stale_kv=True) as engine:

        async def update() -> tuple[int, tuple[Completion, ...], list[Completion]] | None:
            old, new = engine.policy_version + 1, engine.policy_version + 2  # which nothing in the cache is of
            paths = [write_weights(scratch / str(each), published_weights(folder, each)) for each in (old, new)]
            await engine.load_weights(old, paths[0])
            (running,) = await running_groups(engine, [prompt], size=8, sampling=SamplingConfig(max_tokens=58))
            await engine.load_weights(new, paths[1])
            fresh = await engine.sample_group(prompt, size=4, sampling=SamplingConfig(max_tokens=20))
            across = [sample for sample in await running if is_across(sample)]
            return (new, fresh, across) if across else None

        new, fresh, across = await in_time(update)
    model = model_of(folder, published_weights(folder, new))
    for sample in fresh:
        expected = reference_logprobs(model, prompt, sample.token_ids.tolist(), temperature=1.0)
        assert np.abs(sample.logprobs - expected).max() < 1e-3
    for sample in across:
        anew = reference_logprobs(model, prompt, sample.token_ids.tolist(), temperature=1.0)
        num_old = sample.version_spans[0].num_tokens
        assert np.abs(sample.logprobs - anew)[num_old:].max() > 1e-2, "its context was computed anew"
