"""The seam between an actor and whatever samples for it: vLLM in production, a scripted engine in tests."""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lambdapo_async.config.sections import SamplingConfig
from lambdapo_async.rollout import FinishReason, LogProbs, TokenIds, VersionSpan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Completion:
    """One sampled completion before it is decoded and rewarded."""

    token_ids: TokenIds
    """[C] int32, end-of-sequence included when it was sampled."""
    logprobs: LogProbs
    """[C] float32 log mu(token) after temperature."""
    version_spans: tuple[VersionSpan, ...]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a heartbeat says of the engine."""

    name: str
    """Engine name and version, for example ``vllm 0.32.0``."""
    device: str
    dtype: str


CUT_OFF_S = 5.0
"""Seconds after :meth:`InferenceEngine.abort_all` in which every running request has come back."""


class InferenceEngine(Protocol):
    """Samples completions under the weights it was last given."""

    @property
    def info(self) -> EngineInfo:
        """Name, device and dtype."""

    @property
    def policy_version(self) -> int:
        """Version of the weights loaded last; -1 before the first :meth:`load_weights`."""

    async def sample_group(
        self, prompt_ids: Sequence[int], *, size: int, sampling: SamplingConfig, seed: int | None = None
    ) -> tuple[Completion, ...]:
        """Sample ``size`` completions of one prompt; they survive any number of weight updates.

        Raises:
            EngineError: the engine is dead, or the prompt does not fit.
        """

    async def score(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> LogProbs:
        """Log-probabilities of a given completion, under one version of the weights; an update waits meanwhile.

        At temperature 1 and without truncation, whatever the run samples with: engines score what is given, other than
        what they sample, before either, and one token's value cannot be rescaled without those of the whole vocabulary.

        Args:
            prompt_ids: [P] token ids.
            completion_ids: [C] token ids, at least one.

        Returns:
            [C] float32 log pi.

        Raises:
            EngineError: the engine is dead or without weights, or prompt and completion do not fit.
        """

    async def load_weights(self, version: int, path: Path, *, changed: Set[str] | None = None) -> float:
        """Swap in the safetensors file at ``path``; running requests are kept and go on under ``version``.

        The file is validated (names, shapes, dtypes, finite) before anything is changed.

        Args:
            version: what the file holds.
            path: the whole state; nobody may write to it meanwhile, and nothing of it is kept.
            changed: tensors that may differ from the version loaded last; None is all of them.

        Returns:
            Seconds in which no token was sampled.

        Raises:
            WeightsError: the file is not of this model; the old weights are still in place.
            EngineError: the swap itself failed; the engine must not be used again.
        """

    async def abort_all(self) -> None:
        """End running samples; their :meth:`sample_group` returns what there is of all of them, reason ``abort``."""

    async def shutdown(self) -> None:
        """Free the engine's processes and memory; idempotent."""
