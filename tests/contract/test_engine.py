"""What every engine promises, asked of the scripted one and of the real one."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from actors.continuation import continue_group
from actors.engine import InferenceEngine
from lambdapo_async.config.sections import SamplingConfig
from lambdapo_async.errors import EngineError, WeightsError
from tests.contract.engine_world import (
    NORM,
    PROMPT,
    SAMPLING,
    Damage,
    aborted_groups,
    running,
    versions,
    with_nan,
    with_tensor,
)
from tests.engine_fixtures import MAX_LENGTH, published_weights, write_weights
from tests.running_groups import in_time

# vLLM warns a lot, in this process and in the one that it forks with our filters.
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.filterwarnings("default")]


async def test_no_weights_no_samples_and_no_scores(bare_engine: InferenceEngine) -> None:
    assert bare_engine.policy_version == -1
    with pytest.raises(EngineError, match="load_weights first"):
        await bare_engine.sample_group(PROMPT, size=2, sampling=SAMPLING)
    with pytest.raises(EngineError, match="load_weights first"):
        await bare_engine.score(PROMPT, [5])


async def test_columns_of_a_completion_agree(engine: InferenceEngine) -> None:
    completions = await engine.sample_group(PROMPT, size=8, sampling=SAMPLING)
    assert len(completions) == 8
    for completion in completions:
        num_tokens = len(completion.token_ids)
        assert completion.token_ids.dtype == np.int32
        assert completion.logprobs.dtype == np.float32
        assert completion.logprobs.shape == (num_tokens,)
        assert sum(span.num_tokens for span in completion.version_spans) == num_tokens
        assert versions(completion) == [1]
        assert np.isfinite(completion.logprobs).all()
        assert (completion.logprobs <= 0).all()
    assert len({completion.token_ids.tobytes() for completion in completions}) > 1, "samples of a group must differ"


async def test_a_completion_stops_at_the_end_of_sequence_and_holds_it(engine: InferenceEngine) -> None:
    groups = await asyncio.gather(*[engine.sample_group([*PROMPT, i], size=8, sampling=SAMPLING) for i in range(6)])
    stopped = [c for group in groups for c in group if c.finish_reason == "stop"]
    assert stopped, "48 samples of up to 100 tokens never ended; the model of this test must end some"
    for completion in stopped:
        assert completion.token_ids[-1] == 0
        assert 0 not in completion.token_ids[:-1]


async def test_max_tokens_is_a_length_finish(engine: InferenceEngine) -> None:
    completions = await engine.sample_group(PROMPT, size=16, sampling=SamplingConfig(max_tokens=2))
    cut = [completion for completion in completions if completion.finish_reason == "length"]
    assert cut
    assert all(len(completion.token_ids) == 2 and completion.token_ids[-1] != 0 for completion in cut)


async def test_the_longest_possible_prompt_is_sampled_and_a_longer_one_refused(engine: InferenceEngine) -> None:
    sampling = SamplingConfig(max_tokens=8)
    assert await engine.sample_group([5] * (MAX_LENGTH - 8), size=1, sampling=sampling)
    with pytest.raises(EngineError, match=rf"prompt of {MAX_LENGTH - 7} tokens.*max_tokens = 8.*{MAX_LENGTH} by 1"):
        await engine.sample_group([5] * (MAX_LENGTH - 7), size=1, sampling=sampling)
    with pytest.raises(EngineError, match="empty"):
        await engine.sample_group([], size=1, sampling=sampling)


async def test_a_seed_repeats_a_group(engine: InferenceEngine) -> None:
    once, again, other = [
        await engine.sample_group(PROMPT, size=4, sampling=SAMPLING, seed=seed) for seed in (11, 11, 12)
    ]
    assert [c.token_ids.tolist() for c in once] == [c.token_ids.tolist() for c in again]
    assert [c.token_ids.tolist() for c in once] != [c.token_ids.tolist() for c in other]


async def test_top_k_1_is_certain(engine: InferenceEngine) -> None:
    completions = await engine.sample_group(PROMPT, size=4, sampling=SamplingConfig(max_tokens=10, top_k=1))
    assert len({completion.token_ids.tobytes() for completion in completions}) == 1
    assert np.allclose(np.concatenate([completion.logprobs for completion in completions]), 0.0)


async def test_a_score_is_what_a_sample_would_report(engine: InferenceEngine) -> None:
    """At temperature 1, whatever the sample was drawn with; alone and beside running requests."""
    for temperature in (1.0, 0.5):
        sampling = SamplingConfig(max_tokens=30, temperature=temperature)
        (sample,) = await engine.sample_group(PROMPT, size=1, sampling=sampling)
        ids = sample.token_ids.tolist()
        scores = await engine.score(PROMPT, ids)
        assert (scores.dtype, scores.shape) == (np.float32, (len(ids),))
        assert np.allclose(scores, sample.logprobs, atol=1e-3) == (temperature == 1.0)
    tasks = await running(engine, groups=2)
    assert np.allclose(await engine.score(PROMPT, ids), scores, atol=1e-3)
    await asyncio.gather(*tasks)


async def test_a_score_is_under_one_version(engine: InferenceEngine, weights: Callable[[int], Path]) -> None:
    completion = [*range(6, 40)]
    before, update, after = await asyncio.gather(
        engine.score(PROMPT, completion), engine.load_weights(2, weights(2)), engine.score(PROMPT, completion)
    )
    assert update > 0
    assert np.allclose(after, await engine.score(PROMPT, completion), atol=1e-3)
    await engine.load_weights(1, weights(1))
    assert np.allclose(before, await engine.score(PROMPT, completion), atol=1e-3)
    assert np.abs(before - after).mean() > 0.1


async def test_what_cannot_be_scored_is_refused(engine: InferenceEngine) -> None:
    assert len(await engine.score([5] * 4, [6] * (MAX_LENGTH - 5))) == MAX_LENGTH - 5
    with pytest.raises(EngineError, match="by 1"):
        await engine.score([5] * 4, [6] * (MAX_LENGTH - 4))
    with pytest.raises(EngineError, match="empty"):
        await engine.score([], [6])


async def test_only_what_changed_need_be_loaded(
    engine: InferenceEngine, tiny_model_folder: Path, tmp_path: Path
) -> None:
    """And a file in which nothing changed is a new version all the same."""
    tensors = published_weights(tiny_model_folder, 1)
    completion = [*range(6, 40)]
    before = await engine.score(PROMPT, completion)
    same = write_weights(tmp_path / "same", tensors)
    assert await engine.load_weights(5, same, changed=frozenset()) > 0
    assert engine.policy_version == 5
    (sample,) = await engine.sample_group(PROMPT, size=1, sampling=SAMPLING)
    assert versions(sample) == [5]
    await engine.load_weights(1, same, changed={NORM})
    assert np.allclose(before, await engine.score(PROMPT, completion), atol=1e-5)


async def test_running_requests_survive_an_update_and_carry_both_versions(
    engine: InferenceEngine, weights: Callable[[int], Path]
) -> None:
    old, new = weights(1), weights(2)

    async def update() -> bool | None:
        await engine.load_weights(1, old)
        tasks = await running(engine)
        pause_s = await engine.load_weights(2, new)
        assert pause_s > 0
        assert engine.policy_version == 2
        completions = [completion for group in await asyncio.gather(*tasks) for completion in group]
        assert len(completions) == 32
        assert {"stop", "length"} >= {completion.finish_reason for completion in completions}
        return any(versions(completion) == [1, 2] for completion in completions) or None

    await in_time(update)
    (fresh,) = await engine.sample_group(PROMPT, size=1, sampling=SAMPLING)
    assert versions(fresh) == [2]


async def test_abort_all_returns_what_was_sampled(engine: InferenceEngine) -> None:
    groups = await aborted_groups(engine)
    for completion in [one for group in groups for one in group if one.finish_reason == "abort"]:
        assert len(completion.token_ids) < 100
        assert len(completion.logprobs) == len(completion.token_ids)
        assert sum(span.num_tokens for span in completion.version_spans) == len(completion.token_ids)
    assert await engine.sample_group(PROMPT, size=1, sampling=SAMPLING), "the engine must go on after an abort"


async def test_cut_off_samples_are_continued_where_they_stopped(
    engine: InferenceEngine, weights: Callable[[int], Path]
) -> None:
    """Under other weights, too: what was sampled stays as it is, and what follows is as long as it would have been."""
    groups = await aborted_groups(engine)
    assert all(len(group) == 8 for group in groups), "an abort returns all samples of a group"
    await engine.load_weights(2, weights(2))
    for i, partials in enumerate(groups):
        continued = await continue_group(engine, [*PROMPT, i], partials, sampling=SAMPLING)
        for partial, whole in zip(partials, continued, strict=True):
            if partial.finish_reason != "abort":
                assert whole is partial
                continue
            num_old, num_tokens = len(partial.token_ids), len(whole.token_ids)
            assert num_old < num_tokens <= 100
            assert (whole.finish_reason == "stop") == (whole.token_ids[-1] == 0)
            assert (whole.finish_reason == "length") == (num_tokens == 100 and whole.token_ids[-1] != 0)
            assert whole.token_ids[:num_old].tolist() == partial.token_ids.tolist()
            assert whole.logprobs[:num_old].tolist() == partial.logprobs.tolist()
            assert len(whole.logprobs) == num_tokens
            assert versions(whole) == [*versions(partial), 2]
            assert whole.version_spans[-1].num_tokens == num_tokens - num_old


async def test_the_continued_part_has_the_log_probabilities_of_its_whole_context(engine: InferenceEngine) -> None:
    (partials,) = await aborted_groups(engine, groups=1)
    for whole in await continue_group(engine, [*PROMPT, 0], partials, sampling=SAMPLING):
        assert versions(whole) == [1]
        scores = await engine.score([*PROMPT, 0], whole.token_ids.tolist()[:90])
        assert np.allclose(whole.logprobs[:90], scores, atol=1e-3)


async def test_an_abort_leaves_scores_alone(engine: InferenceEngine) -> None:
    tasks = await running(engine, groups=1)
    scoring = asyncio.create_task(engine.score(PROMPT, [*range(6, 40)]))
    await asyncio.sleep(0)
    await engine.abort_all()
    await asyncio.gather(*tasks)
    assert np.allclose(await scoring, await engine.score(PROMPT, [*range(6, 40)]), atol=1e-3)


async def test_a_cancelled_request_leaves_the_others_alone(engine: InferenceEngine) -> None:
    tasks = await running(engine, groups=3)
    tasks[0].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert all(isinstance(result, tuple) and len(result) == 8 for result in results[1:])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda t: {n: x for n, x in t.items() if n != NORM}, f"1 tensors missing: {NORM}", id="missing"),
        pytest.param(
            with_tensor("model.extra.weight", torch.zeros(4)), "unknown to this model: model.extra", id="unknown"
        ),
        pytest.param(
            with_tensor(NORM, torch.zeros(64, dtype=torch.bfloat16)), rf"{NORM} is BF16 \[64\].*\[128\]", id="shape"
        ),
        pytest.param(with_tensor(NORM, torch.zeros(128)), rf"{NORM} is F32 .* expected BF16", id="dtype"),
        pytest.param(with_tensor(NORM, torch.zeros(128, dtype=torch.int8)), f"{NORM} is I8", id="integers"),
        pytest.param(with_nan, f"{NORM} is not finite", id="nan"),
        pytest.param(
            with_tensor(NORM, torch.full((128,), torch.inf).bfloat16()), f"{NORM} is not finite", id="infinity"
        ),
    ],
)
async def test_a_file_of_another_model_is_refused_and_the_old_weights_stay(
    engine: InferenceEngine,
    weights: Callable[[int], Path],
    tmp_path: Path,
    tiny_model_folder: Path,
    damage: Damage,
    message: str,
) -> None:
    greedy = SamplingConfig(max_tokens=20, top_k=1)
    before = await engine.sample_group(PROMPT, size=1, sampling=greedy)
    save_file(damage(published_weights(tiny_model_folder, 2)), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=message):
        await engine.load_weights(2, tmp_path / "w.safetensors")
    assert engine.policy_version == 1
    after = await engine.sample_group(PROMPT, size=1, sampling=greedy)
    assert after[0].token_ids.tolist() == before[0].token_ids.tolist()
    assert versions(after[0]) == [1]


@pytest.mark.parametrize("content", [None, b"", b"\x10\0\0\0\0\0\0\0{}", b"not weights" * 100])
async def test_a_damaged_file_is_refused(engine: InferenceEngine, tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "w").write_bytes(content)
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        await engine.load_weights(2, tmp_path / "w")
    assert engine.policy_version == 1


async def test_a_refused_file_does_not_stop_running_requests(engine: InferenceEngine, tmp_path: Path) -> None:
    tasks = await running(engine, groups=2)
    with pytest.raises(WeightsError):
        await engine.load_weights(2, tmp_path / "missing")
    for completion in [completion for group in await asyncio.gather(*tasks) for completion in group]:
        assert versions(completion) == [1]
        assert completion.finish_reason in ("stop", "length")


async def test_shutdown_is_idempotent_and_final(engine: InferenceEngine, weights: Callable[[int], Path]) -> None:
    tasks = await running(engine, groups=1)
    await engine.shutdown()
    await engine.shutdown()
    with pytest.raises(EngineError, match="dead"):
        await asyncio.gather(*tasks)
    with pytest.raises(EngineError, match="dead"):
        await engine.sample_group(PROMPT, size=1, sampling=SAMPLING)
    with pytest.raises(EngineError, match="dead"):
        await engine.score(PROMPT, [5])
    with pytest.raises(EngineError, match="dead"):
        await engine.load_weights(2, weights(2))
