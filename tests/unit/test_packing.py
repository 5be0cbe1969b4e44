"""Packing: nothing lost, nothing split, nothing over the budget, and full."""

from dataclasses import replace
from itertools import chain, pairwise
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lambdapo_async.packing import MicroBatch, TrainingSequence, pack

BUDGET = 32
lengths_lists = st.lists(st.integers(1, BUDGET), max_size=40)


def sequence(number: int, length: int, *, prompt: int = 1) -> TrainingSequence:
    """Every column of every token tells which sequence and position it belongs to."""
    positions = np.arange(length)
    completion = positions >= prompt
    return TrainingSequence(
        token_ids=(1000 * number + positions).astype(np.int32),
        loss_mask=completion,
        behavior_logprobs=np.where(completion, -(1000 * number + positions), 0).astype(np.float32),
        advantage=number + 0.5,
        token_versions=np.where(completion, number, -1),
        group_key=f"train:0:{number}",
    )


def documents(micro_batch: MicroBatch) -> list[slice]:
    bounds = micro_batch.layout.cu_seqlens.tolist()
    return [slice(start, end) for start, end in pairwise(bounds)]


def rollout_rows(micro_batch: MicroBatch, segment: int) -> list[int]:
    """Tokens of a rollout in order: each but the first is predicted by the one before it."""
    rows = [int((micro_batch.segment_ids_T == segment).nonzero()[-1])]
    while (before := int(micro_batch.predictor_T[rows[0]])) != rows[0]:
        rows.insert(0, before)
    return rows


def assert_intact(micro_batch: MicroBatch, index: int, seen: slice) -> int:
    """One document is exactly one sequence in all columns, its last token not fed; returns its number."""
    rows = rollout_rows(micro_batch, index)
    number = int(micro_batch.input_ids_T[rows[0]]) // 1000
    expected = sequence(number, len(rows))
    fed = max(1, len(rows) - 1)
    assert rows[:fed] == list(range(seen.start, seen.stop))
    assert all(row >= micro_batch.layout.num_tokens for row in rows[fed:])
    assert micro_batch.input_ids_T[rows].tolist() == expected.token_ids.tolist()
    assert micro_batch.position_ids_T[rows].tolist() == list(range(len(rows)))
    assert micro_batch.loss_mask_T[rows].tolist() == expected.loss_mask.tolist()
    assert micro_batch.behavior_logprobs_T[rows].tolist() == expected.behavior_logprobs.tolist()
    assert set(micro_batch.advantages_T[rows].tolist()) == {number + 0.5}
    assert micro_batch.token_versions_T[rows].tolist() == expected.token_versions.tolist()
    assert set(micro_batch.segment_ids_T[rows].tolist()) == {index}
    assert micro_batch.num_loss_tokens == micro_batch.loss_mask_T.sum()
    assert not micro_batch.loss_mask_T[rows[0]]
    return number


@settings(deadline=None)
@given(lengths_lists)
def test_every_sequence_is_once_in_one_piece(lengths: list[int]) -> None:
    sequences = [sequence(number, length) for number, length in enumerate(lengths)]
    seen = []
    for micro_batch in pack(sequences, token_budget=BUDGET):
        rows = documents(micro_batch)
        assert rows[0].start == 0
        assert rows[-1].stop == micro_batch.layout.num_tokens
        assert len(micro_batch.input_ids_T) <= BUDGET
        assert micro_batch.layout.max_seqlen == max(row.stop - row.start for row in rows)
        assert micro_batch.layout.shared is None
        seen += [assert_intact(micro_batch, index, row) for index, row in enumerate(rows)]
    assert sorted(seen) == list(range(len(lengths)))


def columns(micro_batch: MicroBatch) -> list[torch.Tensor]:
    layout = micro_batch.layout
    apart = ("layout", "num_loss_tokens", "group_keys")
    tensors = [getattr(micro_batch, name) for name in MicroBatch.__slots__ if name not in apart]
    return [*tensors, layout.cu_seqlens, *([] if layout.shared is None else [layout.key_marks, layout.shared.index_K])]


def group(number: int, prompt: int, completions: list[int]) -> list[TrainingSequence]:
    """Rollouts whose tokens, advantages and versions name group, rollout and position."""
    sequences = []
    for rollout, length in enumerate(completions):
        positions = np.arange(prompt + length)
        own = positions >= prompt
        sequences.append(
            TrainingSequence(
                token_ids=(1_000_000 * number + np.where(own, 1000 * (rollout + 1), 0) + positions).astype(np.int32),
                loss_mask=own,
                behavior_logprobs=np.where(own, -(100.0 * rollout + positions), 0.0).astype(np.float32),
                advantage=100.0 * number + rollout,
                token_versions=np.where(own, rollout, -1),
                group_key=f"train:0:{number}",
            )
        )
    return sequences


groups_lists = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(0, BUDGET - 9), min_size=1, max_size=6)), max_size=8
)


def seen_by(micro_batch: MicroBatch, row: int) -> list[int]:
    """Tokens that the last one of a segment attends to, in order."""
    layout = micro_batch.layout
    index = int((layout.cu_seqlens <= row).sum()) - 1
    assert row + 1 == layout.cu_seqlens[index + 1]
    keys = range(layout.num_tokens) if layout.shared is None else layout.shared.index_K.tolist()
    return list(keys[layout.key_marks[index] : layout.key_marks[index + 1]])


@settings(deadline=None, max_examples=60)
@given(groups_lists, st.integers(1, 3))
def test_every_rollout_is_once_behind_its_prompt(shapes: list[tuple[int, list[int]]], multiple_of: int) -> None:
    sequences = [each for number, (prompt, own) in enumerate(shapes) for each in group(number, prompt, own)]
    wanted = {tuple(each.token_ids.tolist()): each for each in sequences if each.loss_mask.any()}
    seen = []
    for micro_batch in pack(sequences, token_budget=BUDGET, multiple_of=multiple_of):
        assert len(micro_batch.input_ids_T) <= BUDGET
        prompt_ids = micro_batch.input_ids_T[~micro_batch.loss_mask_T].tolist()
        assert len(set(prompt_ids)) == len(prompt_ids)  # each prompt once
        for segment in set(micro_batch.segment_ids_T[micro_batch.loss_mask_T].tolist()):
            rows = rollout_rows(micro_batch, segment)
            ids = tuple(micro_batch.input_ids_T[rows].tolist())
            sequence = wanted[ids]
            assert micro_batch.position_ids_T[rows].tolist() == list(range(len(ids)))
            assert seen_by(micro_batch, rows[-2]) == rows[:-1]
            assert rows[-1] >= micro_batch.layout.num_tokens
            assert micro_batch.loss_mask_T[rows].tolist() == sequence.loss_mask.tolist()
            assert micro_batch.behavior_logprobs_T[rows].tolist() == sequence.behavior_logprobs.tolist()
            assert micro_batch.token_versions_T[rows].tolist() == sequence.token_versions.tolist()
            own = (micro_batch.segment_ids_T == segment) & micro_batch.loss_mask_T
            assert own.sum() == sequence.loss_mask.sum()
            assert set(micro_batch.advantages_T[own].tolist()) == {sequence.advantage}
            assert micro_batch.group_keys[segment] == sequence.group_key
            seen.append(ids)
    assert sorted(seen) == sorted(wanted)


@settings(deadline=None, max_examples=40)
@given(groups_lists, st.randoms(use_true_random=False))
def test_the_order_of_groups_that_share_prompts_changes_no_bit(
    shapes: list[tuple[int, list[int]]], random: Random
) -> None:
    groups = [group(number, prompt, own) for number, (prompt, own) in enumerate(shapes)]
    shuffled = list(groups)
    random.shuffle(shuffled)
    one, other = (pack(list(chain.from_iterable(each)), token_budget=BUDGET) for each in (groups, shuffled))
    for here, there in zip(one, other, strict=True):
        assert all(torch.equal(mine, yours) for mine, yours in zip(columns(here), columns(there), strict=True))


def test_a_shared_prompt_lies_once_and_completions_alike_side_by_side() -> None:
    (micro_batch,) = pack([*group(1, 3, [2, 4, 2]), *group(2, 5, [4]), *group(3, 3, [2, 1])], token_budget=64)
    assert micro_batch.layout.runs == ((1, 8, 8), (2, 3, 3), (1, 3, 6), (3, 1, 4))
    assert len(micro_batch.input_ids_T) == 9 + 3 + 8 + 3 + 3
    assert micro_batch.layout.num_tokens == 26 - 6
    (micro_batch,) = pack([*group(1, 3, [4, 2]), *group(2, 3, [4, 2])], token_budget=64)
    assert micro_batch.layout.runs == ((2, 3, 3), (2, 3, 6), (2, 1, 4))


def test_groups_of_one_prompt_share_it_in_any_order() -> None:
    first, second = group(1, 3, [4, 2]), [replace(each, group_key="train:1:1") for each in group(1, 3, [4, 2])]
    (one,), (other,) = pack([*first, *second], token_budget=64), pack([*second, *first], token_budget=64)
    assert one.group_keys == other.group_keys == ("train:0:1", "train:1:1", "train:0:1", "train:1:1")
    assert int((~one.loss_mask_T).sum()) == 3


def test_a_group_larger_than_the_budget_repeats_its_prompt() -> None:
    batches = pack(group(1, 10, [20, 12, 10, 9, 2]), token_budget=BUDGET)
    assert len(batches) == 3
    assert sum(int(each.loss_mask_T.sum()) for each in batches) == 53
    assert [int((~each.loss_mask_T).sum()) for each in batches] == [10, 10, 10]


def test_rollouts_without_tokens_leave_their_prompt() -> None:
    (micro_batch,) = pack(group(1, 3, [0, 2, 0]), token_budget=BUDGET)
    assert micro_batch.input_ids_T.tolist() == [1_000_000, 1_000_001, 1_000_002, 1_002_003, 1_002_004]
    (micro_batch,) = pack(group(1, 3, [0, 0]), token_budget=BUDGET)
    assert micro_batch.layout.runs == ((1, 3, 3),)
    assert not micro_batch.loss_mask_T.any()


def test_there_are_no_more_rollouts_than_tokens() -> None:
    """What is summed by rollout has room for as many as there are tokens."""
    (micro_batch,) = pack([*group(1, 1, [3, *[0] * 9]), *group(2, 1, [0, 0]), *group(3, 1, [1])], token_budget=BUDGET)
    assert micro_batch.group_keys == ("train:0:1", "train:0:3", "train:0:2")
    assert sorted(set(micro_batch.segment_ids_T.tolist())) == [0, 1, 2]


@settings(deadline=None)
@given(lengths_lists, st.randoms(use_true_random=False), st.integers(1, 4))
def test_the_order_groups_arrive_in_changes_no_bit(lengths: list[int], random: Random, multiple_of: int) -> None:
    sequences = [sequence(number, length) for number, length in enumerate(lengths)]
    shuffled = list(sequences)
    random.shuffle(shuffled)
    one, other = (pack(each, token_budget=BUDGET, multiple_of=multiple_of) for each in (sequences, shuffled))
    for here, there in zip(one, other, strict=True):
        assert all(torch.equal(mine, yours) for mine, yours in zip(columns(here), columns(there), strict=True))


def test_documents_of_equal_length_are_neighbours() -> None:
    (micro_batch,) = pack([sequence(n, length) for n, length in enumerate([3, 5, 3, 5, 3])], token_budget=BUDGET)
    assert micro_batch.layout.cu_seqlens.diff().tolist() == [4, 4, 2, 2, 2]


@settings(deadline=None)
@given(lengths_lists, st.integers(1, 5))
def test_the_number_of_micro_batches_is_the_multiple_asked_for(lengths: list[int], multiple_of: int) -> None:
    sequences = [sequence(number, length) for number, length in enumerate(lengths)]
    count = len(pack(sequences, token_budget=BUDGET, multiple_of=multiple_of))
    assert count % multiple_of == 0 or count == len(sequences)
    assert count >= len(pack(sequences, token_budget=BUDGET))


def test_dtypes() -> None:
    (micro_batch,) = pack([*group(1, 3, [2, 1]), sequence(2, 5)], token_budget=BUDGET)
    for column in ("input_ids_T", "position_ids_T", "predictor_T", "token_versions_T", "segment_ids_T"):
        assert getattr(micro_batch, column).dtype == torch.int64
    assert micro_batch.layout.cu_seqlens.dtype == micro_batch.layout.key_marks.dtype == torch.int32
    assert micro_batch.layout.shared is not None
    assert micro_batch.layout.shared.index_K.dtype == torch.int64
    assert micro_batch.loss_mask_T.dtype == torch.bool
    assert micro_batch.behavior_logprobs_T.dtype == micro_batch.advantages_T.dtype == torch.float32


def test_to_moves_every_column() -> None:
    (micro_batch,) = pack(group(1, 3, [2, 1]), token_budget=BUDGET)
    moved = micro_batch.to(torch.device("meta"))
    assert len(columns(moved)) == 11
    assert all(tensor.is_meta for tensor in columns(moved))
    assert (moved.layout.max_seqlen, moved.layout.max_keys) == (3, 4)


def test_nothing_packs_to_nothing() -> None:
    assert pack([], token_budget=BUDGET) == []


def test_a_sequence_over_the_budget_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"group train:0:7 has 33 tokens, more than the micro-batch budget of 32"):
        pack([sequence(1, 4), sequence(7, 33)], token_budget=BUDGET)


def test_malformed_sequences_are_refused() -> None:
    good = sequence(1, 4)
    with pytest.raises(ValueError, match="first token without loss"):
        sequence(1, 4, prompt=0)
    with pytest.raises(ValueError, match="first token without loss"):
        sequence(1, 0)
    with pytest.raises(ValueError, match="columns of"):
        TrainingSequence(
            token_ids=good.token_ids,
            loss_mask=good.loss_mask[:-1],
            behavior_logprobs=good.behavior_logprobs,
            advantage=0.0,
            token_versions=good.token_versions,
            group_key="train:0:1",
        )
