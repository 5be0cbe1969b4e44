"""Samples that were cut off, sampled on by whatever engine: their tokens become part of the prompt.

The engine computes their context anew (prefill), so the later tokens are those that it would have sampled itself, and
each token keeps the log-probability and the version under which it was drawn.
"""

import asyncio
from collections.abc import Sequence
from itertools import groupby

import numpy as np

from actors.engine import Completion, InferenceEngine
from lambdapo_async.config.sections import SamplingConfig
from lambdapo_async.rollout import VersionSpan


async def continue_group(
    engine: InferenceEngine, prompt_ids: Sequence[int], partials: Sequence[Completion], *, sampling: SamplingConfig
) -> tuple[Completion, ...]:
    """The group that ``partials`` began: samples that ended stay as they are, the others are sampled on.

    Args:
        prompt_ids: [P] token ids.
        partials: what :meth:`InferenceEngine.sample_group` returned, here or elsewhere; reason ``abort`` is not ended.
        sampling: of the whole completion; ``max_tokens`` counts the partial's tokens, too.

    Raises:
        EngineError: the engine is dead, or the prompt does not fit.
    """
    return tuple(await asyncio.gather(*[_continue(engine, prompt_ids, each, sampling) for each in partials]))


async def _continue(
    engine: InferenceEngine, prompt_ids: Sequence[int], partial: Completion, sampling: SamplingConfig
) -> Completion:
    if partial.finish_reason != "abort":
        return partial
    rest = sampling.model_copy(update={"max_tokens": sampling.max_tokens - len(partial.token_ids)})
    (later,) = await engine.sample_group([*prompt_ids, *partial.token_ids.tolist()], size=1, sampling=rest)
    return _joined(partial, later)


def _joined(first: Completion, later: Completion) -> Completion:
    spans = groupby((*first.version_spans, *later.version_spans), key=lambda span: span.policy_version)
    return Completion(
        token_ids=np.concatenate([first.token_ids, later.token_ids]),
        logprobs=np.concatenate([first.logprobs, later.logprobs]),
        version_spans=tuple(VersionSpan(version, sum(span.num_tokens for span in run)) for version, run in spans),
        finish_reason=later.finish_reason,
    )
