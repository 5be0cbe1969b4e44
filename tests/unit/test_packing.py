"""Packing: nothing lost, nothing split, nothing over the budget, and full."""

import math
from itertools import pairwise

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
    bounds = micro_batch.cu_seqlens.tolist()
    return [slice(start, end) for start, end in pairwise(bounds)]


def assert_intact(micro_batch: MicroBatch, index: int, rows: slice) -> int:
    """One document is exactly one sequence in all columns; returns its number."""
    number = int(micro_batch.input_ids_T[rows.start]) // 1000
    expected = sequence(number, rows.stop - rows.start)
    assert micro_batch.input_ids_T[rows].tolist() == expected.token_ids.tolist()
    assert micro_batch.position_ids_T[rows].tolist() == list(range(rows.stop - rows.start))
    assert micro_batch.loss_mask_T[rows].tolist() == expected.loss_mask.tolist()
    assert micro_batch.behavior_logprobs_T[rows].tolist() == expected.behavior_logprobs.tolist()
    assert set(micro_batch.advantages_T[rows].tolist()) == {number + 0.5}
    assert micro_batch.token_versions_T[rows].tolist() == expected.token_versions.tolist()
    assert set(micro_batch.segment_ids_T[rows].tolist()) == {index}
    assert not micro_batch.loss_mask_T[rows.start]
    return number


@settings(deadline=None)
@given(lengths_lists)
def test_every_sequence_is_once_in_one_piece(lengths: list[int]) -> None:
    sequences = [sequence(number, length) for number, length in enumerate(lengths)]
    seen = []
    for micro_batch in pack(sequences, token_budget=BUDGET):
        rows = documents(micro_batch)
        assert rows[0].start == 0
        assert rows[-1].stop == len(micro_batch.input_ids_T) <= BUDGET
        assert micro_batch.max_seqlen == max(row.stop - row.start for row in rows)
        seen += [assert_intact(micro_batch, index, row) for index, row in enumerate(rows)]
    assert sorted(seen) == list(range(len(lengths)))


@settings(deadline=None)
@given(lengths_lists, st.randoms(use_true_random=False))
def test_input_order_changes_neither_count_nor_sums(lengths: list[int], random: object) -> None:
    sequences = [sequence(number, length) for number, length in enumerate(lengths)]
    shuffled = list(sequences)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = pack(sequences, token_budget=BUDGET), pack(shuffled, token_budget=BUDGET)
    assert [len(each.input_ids_T) for each in one] == [len(each.input_ids_T) for each in other]
    for column in ("input_ids_T", "loss_mask_T", "position_ids_T"):
        totals = [sum(int(getattr(each, column).sum()) for each in batches) for batches in (one, other)]
        assert totals[0] == totals[1]


def test_is_deterministic() -> None:
    sequences = [sequence(number, 1 + number % 9) for number in range(50)]
    one, other = pack(sequences, token_budget=BUDGET), pack(sequences, token_budget=BUDGET)
    assert all(torch.equal(a.input_ids_T, b.input_ids_T) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_fills_the_budget_on_long_tailed_lengths(seed: int) -> None:
    drawn = np.random.default_rng(seed).lognormal(mean=5.5, sigma=0.8, size=1024)
    lengths = np.clip(drawn.astype(int), 2, 4096)
    budget = 8192
    micro_batches = pack([sequence(n, int(length)) for n, length in enumerate(lengths)], token_budget=budget)
    full = [len(each.input_ids_T) / budget for each in micro_batches[:-1]]
    assert np.mean(full) >= 0.97
    assert len(micro_batches) == math.ceil(lengths.sum() / budget)


def test_dtypes() -> None:
    (micro_batch,) = pack([sequence(1, 3), sequence(2, 5)], token_budget=BUDGET)
    for column in ("input_ids_T", "position_ids_T", "token_versions_T", "segment_ids_T"):
        assert getattr(micro_batch, column).dtype == torch.int64
    assert micro_batch.cu_seqlens.dtype == torch.int32
    assert micro_batch.loss_mask_T.dtype == torch.bool
    assert micro_batch.behavior_logprobs_T.dtype == micro_batch.advantages_T.dtype == torch.float32


def test_to_moves_every_column() -> None:
    (micro_batch,) = pack([sequence(1, 3)], token_budget=BUDGET)
    moved = micro_batch.to(torch.device("meta"))
    tensors = [getattr(moved, name) for name in MicroBatch.__slots__]
    assert all(tensor.is_meta for tensor in tensors if isinstance(tensor, torch.Tensor))
    assert moved.max_seqlen == 3


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
