"""Sequences -> micro-batches of at most ``token_budget`` tokens, without padding and with shared prompts only once.

T = tokens of a micro-batch, L = tokens of one sequence. Every per-token column describes the token at its own position
t: ``logprobs_T[t]`` = log pi(token t | the tokens before it in its rollout). Nothing follows the last token of a
completion, so no layer need see it: these tokens come after all others, and ``layout`` ends before them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lambdapo_async.bin_packing import Family, fewest_bins, partition
from lambdapo_async.packed_layout import PackedLayout, Segment, packed_layout


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainingSequence:
    """One rollout as the learner trains on it: prompt, then completion."""

    token_ids: NDArray[np.int32]
    """[L]"""
    loss_mask: NDArray[np.bool_]
    """[L] True for tokens that the policy produced; never for the first, which nothing predicts."""
    behavior_logprobs: NDArray[np.float32]
    """[L] log mu, 0 where there is no loss."""
    advantage: float
    token_versions: NDArray[np.int64]
    """[L] policy version that produced the token, -1 in the prompt."""
    group_key: str
    """Names the group in errors."""

    def __post_init__(self) -> None:
        shapes = [column.shape for column in (self.loss_mask, self.behavior_logprobs, self.token_versions)]
        if self.token_ids.ndim != 1 or any(shape != self.token_ids.shape for shape in shapes):
            raise ValueError(f"group {self.group_key}: columns of {self.token_ids.shape} tokens have shapes {shapes}")
        if len(self.token_ids) == 0 or self.loss_mask[0]:
            raise ValueError(f"group {self.group_key}: a sequence needs a first token without loss")

    @property
    def prompt_length(self) -> int:
        """Tokens before the first with loss; all where none has."""
        return int(self.loss_mask.argmax()) or len(self.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MicroBatch:
    """Rollouts side by side, those of one prompt behind a single copy of it; attention follows ``layout``.

    The model is fed the first ``layout.num_tokens`` of the T tokens; the others are only predicted.
    """

    input_ids_T: Tensor
    """int64"""
    position_ids_T: Tensor
    """int64 position in the token's rollout."""
    predictor_T: Tensor
    """int64 token whose hidden state predicts this one: the one before it in its rollout; itself where it is first."""
    layout: PackedLayout
    """What each token that the model is fed attends to."""
    loss_mask_T: Tensor
    """bool"""
    behavior_logprobs_T: Tensor
    """float32"""
    advantages_T: Tensor
    """float32"""
    token_versions_T: Tensor
    """int64"""
    segment_ids_T: Tensor
    """int64 number of the token's rollout, from 0; that of the first for a prompt that several share."""
    num_loss_tokens: int
    """S: how often ``loss_mask_T`` is True, for those on the host who want to know and not wait for a device."""

    group_keys: tuple[str, ...]
    """Of each rollout by its number."""

    def loss_indices(self) -> Tensor:
        """[S] int64 the tokens with loss, in order."""
        return torch.nonzero_static(self.loss_mask_T, size=self.num_loss_tokens)[:, 0]

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch on ``device``, from the host; nobody waits for what the device does."""
        return MicroBatch(
            input_ids_T=self.input_ids_T.to(device, non_blocking=True),
            position_ids_T=self.position_ids_T.to(device, non_blocking=True),
            predictor_T=self.predictor_T.to(device, non_blocking=True),
            layout=self.layout.to(device),
            loss_mask_T=self.loss_mask_T.to(device, non_blocking=True),
            behavior_logprobs_T=self.behavior_logprobs_T.to(device, non_blocking=True),
            advantages_T=self.advantages_T.to(device, non_blocking=True),
            token_versions_T=self.token_versions_T.to(device, non_blocking=True),
            segment_ids_T=self.segment_ids_T.to(device, non_blocking=True),
            num_loss_tokens=self.num_loss_tokens,
            group_keys=self.group_keys,
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Tokens of one rollout that lie together in a micro-batch."""

    sequence: TrainingSequence
    rollout: int
    """Its number in the micro-batch."""
    rows: range
    """Positions in the sequence."""
    before: "_Part | None" = None
    """What they continue."""


def pack(sequences: Sequence[TrainingSequence], *, token_budget: int, multiple_of: int = 1) -> list[MicroBatch]:
    """The fewest micro-batches found, in little and even work; see ``bin_packing``.

    Rollouts of one prompt lie behind a single copy of it, which all of them attend to; those that do not fit into one
    micro-batch repeat it in the next. Deterministic in the set of groups: the order they arrive in changes no bit of
    any micro-batch, as long as the sequences of one group keep theirs.

    Args:
        sequences: whole groups.
        token_budget: most tokens of a micro-batch.
        multiple_of: number of ranks that share the micro-batches; see ``rank_balance.split_over_ranks``.

    Raises:
        ValueError: a sequence is longer than ``token_budget``.
    """
    longest = max(sequences, key=lambda each: len(each.token_ids), default=None)
    if longest is not None and len(longest.token_ids) > token_budget:
        raise ValueError(
            f"a sequence of group {longest.group_key} has {len(longest.token_ids)} tokens, more than the micro-batch "
            f"budget of {token_budget}: raise learner.micro_batch_tokens or lower model.max_length"
        )
    families = _families(sequences)
    bins = partition([_lengths(family) for family in families], token_budget, multiple_of=multiple_of)
    return [_micro_batch([[families[f][each] for each in members] for f, members in bin_]) for bin_ in bins]


def fewest_micro_batches(sequences: Sequence[TrainingSequence], *, token_budget: int) -> int:
    """A number of micro-batches that :func:`pack` cannot go below."""
    return fewest_bins([_lengths(family) for family in _families(sequences)], token_budget)


def _families(sequences: Sequence[TrainingSequence]) -> list[list[TrainingSequence]]:
    """Sequences with the same prompt, the longest first."""
    families: dict[bytes, list[TrainingSequence]] = {}
    for sequence in sorted(sequences, key=lambda each: (-len(each.token_ids), each.group_key)):
        families.setdefault(sequence.token_ids[: sequence.prompt_length].tobytes(), []).append(sequence)
    return list(families.values())


def _lengths(family: Sequence[TrainingSequence]) -> Family:
    prompt = family[0].prompt_length
    return Family(prompt, tuple(len(member.token_ids) - prompt for member in family))


def _micro_batch(pieces: Sequence[Sequence[TrainingSequence]]) -> MicroBatch:
    """Rollouts of each prompt -> documents and prompts, completions, last tokens; alike ones lie side by side."""
    fed, last = _parts(pieces)
    parts = [*fed, *last]
    lengths = [len(part.rows) for part in parts]
    starts = dict(zip(parts, np.cumsum([0, *lengths[:-1]]).tolist(), strict=True))
    predictor_T = np.arange(sum(lengths)) - 1
    predictor_T[list(starts.values())] = [
        starts[part] if part.before is None else _tokens_of(part.before, starts)[-1] for part in parts
    ]
    advantages = np.array([part.sequence.advantage for part in parts], np.float32)
    keys = {part.rollout: part.sequence.group_key for part in parts}
    cut = [(part.sequence, slice(part.rows.start, part.rows.stop)) for part in parts]
    loss_mask_T = _column([sequence.loss_mask[rows] for sequence, rows in cut], np.bool_)
    return MicroBatch(
        input_ids_T=_column([sequence.token_ids[rows] for sequence, rows in cut], np.int64),
        position_ids_T=_column([np.arange(part.rows.start, part.rows.stop) for part in parts], np.int64),
        predictor_T=torch.from_numpy(predictor_T),
        layout=packed_layout([Segment(len(part.rows), _tokens_of(part.before, starts)) for part in fed]),
        loss_mask_T=loss_mask_T,
        behavior_logprobs_T=_column([sequence.behavior_logprobs[rows] for sequence, rows in cut], np.float32),
        advantages_T=torch.from_numpy(np.repeat(advantages, lengths)),
        token_versions_T=_column([sequence.token_versions[rows] for sequence, rows in cut], np.int64),
        segment_ids_T=torch.from_numpy(np.repeat([part.rollout for part in parts], lengths)),
        num_loss_tokens=int(loss_mask_T.sum()),
        group_keys=tuple(keys[rollout] for rollout in range(len(keys))),
    )


def _parts(pieces: Sequence[Sequence[TrainingSequence]]) -> tuple[list[_Part], list[_Part]]:
    """What lies in a micro-batch, in order: what the model is fed, and the last token of each completion that has any.

    A completion of at most one token has no part in the first. Each number is that of some token, so there are no more
    rollouts than tokens: those without any are the last of their prompt, and their numbers the next ones'.
    """
    rollout = 0
    whole: list[_Part] = []
    completions: list[_Part] = []
    last: list[_Part] = []
    for first, *others in pieces:
        end = first.prompt_length
        if not others:
            whole.append(_Part(first, rollout, range(_num_fed(first, end))))
            ends = whole[-1:]
        else:
            whole.append(prompt := _Part(first, rollout, range(end)))
            members = enumerate((first, *others), rollout)
            ends = [_Part(each, number, range(end, _num_fed(each, end)), prompt) for number, each in members]
            completions += ends
        with_tokens = [part for part in ends if end < len(part.sequence.token_ids)]
        last += map(_last_of, with_tokens)
        rollout += max(1, len(with_tokens))
    whole.sort(key=lambda part: -len(part.rows))
    completions.sort(key=lambda part: (-len(part.rows), -part.rows.start))
    return [part for part in (*whole, *completions) if part.rows], last


def _num_fed(sequence: TrainingSequence, prompt_length: int) -> int:
    """Tokens of a rollout that others follow; all of one without completion, so that no prompt is empty."""
    num_tokens = len(sequence.token_ids)
    return num_tokens - (prompt_length < num_tokens)


def _last_of(part: _Part) -> _Part:
    """The token after a part, which is the last of its rollout."""
    end = len(part.sequence.token_ids)
    return _Part(part.sequence, part.rollout, range(end - 1, end), part if part.rows else part.before)


def _tokens_of(part: _Part | None, starts: Mapping[_Part, int]) -> range:
    """Where a part lies in the micro-batch."""
    return range(0) if part is None else range(starts[part], starts[part] + len(part.rows))


def _column(parts: Sequence[np.ndarray], dtype: type[np.generic]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(dtype))
