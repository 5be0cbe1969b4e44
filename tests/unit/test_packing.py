"""Packing: nothing lost, nothing split, nothing over the budget, and full."""

import math
from collections.abc import Callable
from itertools import pairwise
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lambdapo_async.bin_packing import best_fit, fewest_bins, partition, spread, work
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


def columns(micro_batch: MicroBatch) -> list[torch.Tensor]:
    return [each for each in (getattr(micro_batch, name) for name in MicroBatch.__slots__) if not isinstance(each, int)]


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
    assert micro_batch.cu_seqlens.diff().tolist() == [5, 5, 3, 3, 3]


@settings(deadline=None)
@given(lengths_lists, st.integers(1, 5))
def test_the_number_of_micro_batches_is_the_multiple_asked_for(lengths: list[int], multiple_of: int) -> None:
    sequences = [sequence(number, length) for number, length in enumerate(lengths)]
    count = len(pack(sequences, token_budget=BUDGET, multiple_of=multiple_of))
    assert count % multiple_of == 0 or count == len(sequences)
    assert count >= len(pack(sequences, token_budget=BUDGET))


MAX_LENGTH = 4096


def lognormal(random: np.random.Generator, count: int) -> np.ndarray:
    """Answers of a few hundred tokens with a long tail."""
    return random.lognormal(5.5, 0.8, count)


def truncated(random: np.random.Generator, count: int) -> np.ndarray:
    """Long reasoning: a tenth of all rollouts is cut off at the limit."""
    return random.lognormal(np.log(1600), 0.75, count)


def bimodal(random: np.random.Generator, count: int) -> np.ndarray:
    """Easy questions answered briefly, hard ones at length."""
    return np.where(random.random(count) < 0.7, random.normal(300, 60, count), random.normal(3300, 400, count))


def near_max(random: np.random.Generator, count: int) -> np.ndarray:
    """Almost everything is close to the limit, the rest failed early."""
    return np.where(random.random(count) < 0.85, random.normal(4000, 60, count), random.uniform(40, 700, count))


Draw = Callable[[np.random.Generator, int], np.ndarray]


def drawn_lengths(draw: Draw, seed: int, count: int) -> list[int]:
    drawn = draw(np.random.default_rng(seed), count).astype(int).clip(20, MAX_LENGTH)
    return sorted(drawn.tolist(), reverse=True)


@pytest.mark.parametrize("budget", [8192, 16_384])
@pytest.mark.parametrize("draw", [lognormal, truncated, bimodal, near_max], ids=lambda draw: draw.__name__)
def test_fills_micro_batches_to_97_percent(draw: Draw, budget: int) -> None:
    """Tokens over tokens that fit; beyond what rounding to whole micro-batches must leave empty, 3 % at most."""
    for seed in range(3):
        lengths = drawn_lengths(draw, seed, 1024)
        bins = partition(lengths, budget)
        assert max(sum(lengths[each] for each in bin_) for bin_ in bins) <= budget
        unavoidable = math.ceil(sum(lengths) / budget) * budget - sum(lengths)
        assert (sum(lengths) + unavoidable) / (len(bins) * budget) >= 0.97


@pytest.mark.parametrize("draw", [lognormal, truncated, bimodal], ids=lambda draw: draw.__name__)
def test_micro_batches_cost_alike(draw: Draw) -> None:
    lengths = drawn_lengths(draw, 0, 512)
    costs = [work([lengths[each] for each in bin_]) for bin_ in partition(lengths, 16_384)]
    assert max(costs) < 1.15 * np.mean(costs)
    assert costs == sorted(costs, reverse=True)


def exhaustive_count(lengths: list[int], capacity: int) -> int:
    """The true minimum: every length into every bin it fits, deepest first."""

    def search(rest: list[int], rooms: tuple[int, ...]) -> int:
        if not rest:
            return len(rooms)
        length, *others = rest
        options = {
            tuple(sorted((*rooms[:i], room - length, *rooms[i + 1 :])))
            for i, room in enumerate(rooms)
            if room >= length
        }
        return min(search(others, each) for each in (*options, tuple(sorted((*rooms, capacity - length)))))

    return search(lengths, ())


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=7))
def test_few_lengths_need_at_most_one_bin_more_than_possible(lengths: list[int]) -> None:
    ordered = sorted(lengths, reverse=True)
    best = exhaustive_count(ordered, 12)
    assert fewest_bins(ordered, 12) <= best <= len(partition(ordered, 12)) <= best + 1


def just_over_a_quarter(random: np.random.Generator, count: int) -> np.ndarray:
    return random.uniform(1200, 1470, count)


@pytest.mark.parametrize(("draw", "winner"), [(just_over_a_quarter, "spread"), (truncated, "best fit")])
def test_each_greedy_rule_is_needed_somewhere(draw: Draw, winner: str) -> None:
    lengths = drawn_lengths(draw, 0, 512)
    counts = {
        "best fit": len(best_fit(lengths, MAX_LENGTH)),
        "spread": len(spread(lengths, MAX_LENGTH, fewest_bins(lengths, MAX_LENGTH))),
    }
    assert len(partition(lengths, MAX_LENGTH)) == counts.pop(winner) < min(counts.values())


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
