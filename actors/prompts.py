"""From a lease to token ids, and from token ids back to text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from actors.engine import Completion
from lambdapo_async.broker.interface import RunStore
from lambdapo_async.config import RunConfig
from lambdapo_async.rollout import Lease, TokenIds
from lambdapo_async.tasks.interface import Row
from lambdapo_async.tasks.order import row_of
from lambdapo_async.tasks.prompts import PromptEncoder


class Detokenizer(Protocol):
    """The part of a transformers tokenizer that answers need."""

    def batch_decode(self, sequences: list[list[int]], *, skip_special_tokens: bool) -> list[str]:
        """Text of each sequence."""


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """What a lease asks."""

    row: Row
    token_ids: TokenIds
    """[P] int32"""
    num_samples: int


class LeasedPrompts:
    """Looks rows up in the run; its calls may wait for Redis, so they belong on a thread."""

    def __init__(
        self, run_store: RunStore, encoder: PromptEncoder, detokenizer: Detokenizer, config: RunConfig
    ) -> None:
        self._run_store, self._encoder, self._detokenizer = run_store, encoder, detokenizer
        self._config = config
        self._num_train = run_store.num_rows("train")

    def of(self, lease: Lease) -> Prompt:
        """The row behind ``lease``; training groups have G samples, a held-out prompt has one."""
        index, num_samples = lease.index, 1
        if lease.split == "train":
            index = row_of(lease.index, num_rows=self._num_train, seed=self._config.seed)
            num_samples = self._config.rollout.group_size
        row = Row.from_map(self._run_store.row(lease.split, index))
        return Prompt(row, np.array(self._encoder.encode(row), np.int32), num_samples)

    def decode(self, completions: Sequence[Completion]) -> list[str]:
        """Text of each completion, without special tokens."""
        ids = [completion.token_ids.tolist() for completion in completions]
        return self._detokenizer.batch_decode(ids, skip_special_tokens=True)
