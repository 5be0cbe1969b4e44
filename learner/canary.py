"""The learner's side of the canary: fixed rows, scored under the weights that were just published."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lambdapo_async.errors import ConfigError
from lambdapo_async.packing import MicroBatch, TrainingSequence, pack
from lambdapo_async.tasks.interface import Row
from lambdapo_async.tasks.prompts import PromptEncoder, Tokenizer
from lambdapo_async.weights.canary import Canary, CanaryRow, ModelIdentity
from lambdapo_async.weights.canary_store import CanaryStore
from learner.crew import Crew
from learner.parallel import ALONE

PUBLISHED_DTYPE = "bfloat16"
"""Weights are published in it, so whatever the learner computes in, actors differ by at least its rounding."""
ROWS_PER_SPLIT = 2
MAX_COMPLETION_TOKENS = 128
KEYFRAME_DISTANCE = 8
"""Versions between keyframes with a canary of their own: large steps make every version a keyframe, and who needs the
canary of a certain version asks."""


class ScoringPolicy(Protocol):
    """The part of ``Policy`` that the canary needs."""

    @property
    def device(self) -> torch.device:
        """Where the model lives."""

    def logprobs(self, micro_batch: MicroBatch, *, temperature: float) -> Tensor:
        """[T] float32 log pi of each token, 0 where there is no loss; without gradient."""


def canary_sequences(
    splits: Sequence[Sequence[Row]], encoder: PromptEncoder, tokenizer: Tokenizer, *, max_tokens: int
) -> list[TrainingSequence]:
    """The first rows of each split with their reference solution, or answer, as completion.

    Args:
        splits: training and held-out rows whose prompts fit.
        max_tokens: ``sampling.max_tokens``; completions are cut to it and to ``MAX_COMPLETION_TOKENS``.

    Raises:
        ConfigError: no row has a reference.
    """
    longest = min(max_tokens, MAX_COMPLETION_TOKENS)
    sequences = [
        sequence
        for rows in splits
        for sequence in islice(_sequences(rows, encoder, tokenizer, longest), ROWS_PER_SPLIT)
    ]
    if not sequences:
        raise ConfigError("no row has a solution or answer to score: actors cannot be checked against the learner")
    return sequences


def _sequences(
    rows: Sequence[Row], encoder: PromptEncoder, tokenizer: Tokenizer, longest: int
) -> Iterator[TrainingSequence]:
    for row in rows:
        prompt_ids = encoder.encode(row)
        completion_ids = tokenizer.encode(row.solution or row.answer, add_special_tokens=False)[:longest]
        if completion_ids:
            yield canary_sequence(prompt_ids, completion_ids)


def canary_sequence(prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> TrainingSequence:
    """One row, its completion to be scored."""
    length = len(prompt_ids) + len(completion_ids)
    return TrainingSequence(
        token_ids=np.array([*prompt_ids, *completion_ids], np.int32),
        loss_mask=np.arange(length) >= len(prompt_ids),
        behavior_logprobs=np.zeros(length, np.float32),
        advantage=0.0,
        token_versions=np.zeros(length, np.int64),
        group_key="canary",
    )


def score(policy: ScoringPolicy, sequence: TrainingSequence) -> list[float]:
    """[C] log pi of the completion's tokens at temperature 1, in nats; on all ranks together."""
    # One row at a time, as memory allows at any moment: four rows are nothing beside a step.
    (micro_batch,) = pack([sequence], token_budget=len(sequence.token_ids))
    logprobs_T = policy.logprobs(micro_batch.to(policy.device), temperature=1.0).cpu()
    logprobs: list[float] = logprobs_T[micro_batch.loss_mask_T].clamp(max=0.0).tolist()
    return logprobs


class LearnerCanary:
    """Publishes a canary at new keyframes and whenever an actor asks. Not thread-safe: the learner's loop calls."""

    def __init__(
        self,
        store: CanaryStore,
        policy: ScoringPolicy,
        sequences: Sequence[TrainingSequence],
        *,
        identity: ModelIdentity,
        fence: int,
        crew: Crew = Crew(ALONE),  # noqa: B008 - frozen
    ) -> None:
        self._store, self._policy, self._identity, self._fence = store, policy, identity, fence
        self._sequences, self._crew = sequences, crew
        self._keyframe_version: int | None = None

    def is_due(self, keyframe_version: int) -> bool:
        """Whether a keyframe still needs a canary, or somebody asked."""
        last = self._keyframe_version
        return last is None or keyframe_version >= last + KEYFRAME_DISTANCE or self._store.is_canary_asked()

    def publish(self, version: int, checksum: str, *, keyframe_version: int) -> None:
        """Score the rows and publish what came out.

        Args:
            version: newest published version, whose weights the policy holds right now.
            checksum: of its published state.
            keyframe_version: newest keyframe at or before it.

        Raises:
            FencedError: another learner owns the run.
        """
        canary = Canary(
            version=version,
            checksum=checksum,
            config_hash=self._identity.config_hash,
            tokenizer_hash=self._identity.tokenizer_hash,
            dtype=PUBLISHED_DTYPE,
            rows=tuple(self._scored(sequence) for sequence in self._sequences),
        )
        self._store.put_canary(canary.to_bytes(), fence=self._fence)
        self._keyframe_version = keyframe_version

    def _scored(self, sequence: TrainingSequence) -> CanaryRow:
        tokens, num_prompt = sequence.token_ids.tolist(), int((~sequence.loss_mask).sum())
        prompt_ids, completion_ids = tokens[:num_prompt], tokens[num_prompt:]
        self._crew.score(prompt_ids, completion_ids)
        return CanaryRow(
            prompt_ids=prompt_ids, completion_ids=completion_ids, logprobs=tuple(score(self._policy, sequence))
        )
