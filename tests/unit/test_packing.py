"""Packing: nothing lost, nothing split, nothing over the budget, and full."""

import math
from collections.abc import Callable
from itertools import chain, combinations, pairwise
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.lengths import draw_groups
from lambdapo_async.bin_packing import Family, best_fit, fewest_bins, fullest, partition, spread, to_the_brim, work
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


def assert_intact(micro_batch: MicroBatch, index: int, rows: slice) -> int:
    """One document is exactly one sequence in all columns; returns its number."""
    number = int(micro_batch.input_ids_T[rows.start]) // 1000
    expected = sequence(number, rows.stop - rows.start)
    assert micro_batch.input_ids_T[rows].tolist() == expected.token_ids.tolist()
    assert micro_batch.position_ids_T[rows].tolist() == list(range(rows.stop - rows.start))
    assert micro_batch.predictor_T[rows].tolist() == [rows.start, *range(rows.start, rows.stop - 1)]
    assert micro_batch.loss_mask_T[rows].tolist() == expected.loss_mask.tolist()
    assert micro_batch.behavior_logprobs_T[rows].tolist() == expected.behavior_logprobs.tolist()
    assert set(micro_batch.advantages_T[rows].tolist()) == {number + 0.5}
    assert micro_batch.token_versions_T[rows].tolist() == expected.token_versions.tolist()
    assert set(micro_batch.segment_ids_T[rows].tolist()) == {index}
    assert micro_batch.num_loss_tokens == micro_batch.loss_mask_T.sum()
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


def rollout_rows(micro_batch: MicroBatch, segment: int) -> list[int]:
    """Tokens that the last of a rollout's tokens sees, in order: the rollout itself."""
    layout = micro_batch.layout
    last = int((micro_batch.segment_ids_T == segment).nonzero()[-1])
    index = int((layout.cu_seqlens <= last).sum()) - 1
    keys = range(layout.num_tokens) if layout.shared is None else layout.shared.index_K.tolist()
    return list(keys[layout.key_marks[index] : layout.key_marks[index + 1]])


@settings(deadline=None, max_examples=60)
@given(groups_lists, st.integers(1, 3))
def test_every_rollout_is_once_behind_its_prompt(shapes: list[tuple[int, list[int]]], multiple_of: int) -> None:
    sequences = [each for number, (prompt, own) in enumerate(shapes) for each in group(number, prompt, own)]
    wanted = {tuple(each.token_ids.tolist()): each for each in sequences if each.loss_mask.any()}
    seen = []
    for micro_batch in pack(sequences, token_budget=BUDGET, multiple_of=multiple_of):
        assert len(micro_batch.input_ids_T) == micro_batch.layout.num_tokens <= BUDGET
        prompt_ids = micro_batch.input_ids_T[~micro_batch.loss_mask_T].tolist()
        assert len(set(prompt_ids)) == len(prompt_ids)  # each prompt once
        for segment in set(micro_batch.segment_ids_T[micro_batch.loss_mask_T].tolist()):
            rows = rollout_rows(micro_batch, segment)
            ids = tuple(micro_batch.input_ids_T[rows].tolist())
            sequence = wanted[ids]
            assert micro_batch.position_ids_T[rows].tolist() == list(range(len(ids)))
            assert micro_batch.predictor_T[rows].tolist() == [rows[0], *rows[:-1]]
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
    assert micro_batch.layout.runs == ((1, 9, 9), (2, 3, 3), (1, 4, 7), (3, 2, 5), (1, 1, 4))
    assert len(micro_batch.input_ids_T) == 9 + 3 + 8 + 3 + 3


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
    assert micro_batch.layout.cu_seqlens.diff().tolist() == [5, 5, 3, 3, 3]


@settings(deadline=None)
@given(lengths_lists, st.integers(1, 5))
def test_the_number_of_micro_batches_is_the_multiple_asked_for(lengths: list[int], multiple_of: int) -> None:
    sequences = [sequence(number, length) for number, length in enumerate(lengths)]
    count = len(pack(sequences, token_budget=BUDGET, multiple_of=multiple_of))
    assert count % multiple_of == 0 or count == len(sequences)
    assert count >= len(pack(sequences, token_budget=BUDGET))


MAX_LENGTH = 4096
FILL = {"lognormal": 0.97, "truncated": 0.965, "bimodal": 0.97, "near_max": 0.95}
"""Least share of the budget; what is near the limit leaves no room for another rollout with its prompt."""


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


def alone(lengths: list[int]) -> list[Family]:
    return [Family(length, (0,)) for length in lengths]


def size(family: Family, members: tuple[int, ...]) -> int:
    return family.prompt + sum(family.members[each] for each in members)


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
        bins = partition(alone(lengths), budget)
        assert max(sum(lengths[each] for each, _ in bin_) for bin_ in bins) <= budget
        unavoidable = math.ceil(sum(lengths) / budget) * budget - sum(lengths)
        assert (sum(lengths) + unavoidable) / (len(bins) * budget) >= 0.97


@pytest.mark.parametrize("budget", [8192, 16_384])
@pytest.mark.parametrize("draw", [lognormal, truncated, bimodal, near_max], ids=lambda draw: draw.__name__)
def test_families_fill_micro_batches_and_repeat_few_prompts(draw: Draw, budget: int) -> None:
    """Groups of eight: at most 2.5 % of the tokens are prompts repeated, and no more bins than with nothing shared."""
    random = np.random.default_rng(0)
    drawn = draw(random, 1024).astype(int).clip(20, MAX_LENGTH - 256).reshape(-1, 8)
    families = [Family(int(random.integers(60, 250)), tuple(sorted(row.tolist(), reverse=True))) for row in drawn]
    bins = partition(families, budget)
    sizes = [sum(size(families[each], members) for each, members in bin_) for bin_ in bins]
    assert max(sizes) <= budget
    tokens = sum(each.num_tokens for each in families)
    unavoidable = math.ceil(sum(sizes) / budget) * budget - sum(sizes)
    assert (sum(sizes) + unavoidable) / (len(bins) * budget) >= FILL[draw.__name__]
    assert sum(sizes) <= 1.025 * tokens
    assert len(bins) <= len(partition(alone(repeated(families)), budget))


def repeated(families: list[Family]) -> list[int]:
    """Every rollout with a prompt of its own."""
    return sorted((each.prompt + own for each in families for own in each.members), reverse=True)


@pytest.mark.parametrize("draw", [lognormal, truncated, bimodal], ids=lambda draw: draw.__name__)
def test_micro_batches_cost_alike(draw: Draw) -> None:
    lengths = drawn_lengths(draw, 0, 512)
    bins = partition(alone(lengths), 16_384)
    costs = [sum(work(lengths[each], ()) for each, _ in bin_) for bin_ in bins]
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
    families = alone(ordered)
    assert fewest_bins(families, 12) <= best <= len(partition(families, 12)) <= best + 1


def test_prompts_that_rollouts_need_count_in_the_bound() -> None:
    """Nine completions of 224 fit behind one prompt of 32, but the ninth belongs to the next group of eight."""
    families = [Family(32, (224,) * 8)] * 5
    assert fewest_bins(families, 2048) == len(partition(families, 2048)) == 5
    assert fewest_bins([Family(32, (224,) * 9)] * 5, 2048) == 5
    assert fewest_bins([Family(0, (224,) * 8)] * 9, 2048) == 8


def just_over_a_quarter(random: np.random.Generator, count: int) -> np.ndarray:
    return random.uniform(1200, 1470, count)


@pytest.mark.parametrize(("draw", "winner"), [(just_over_a_quarter, "spread"), (truncated, "best fit")])
def test_each_greedy_rule_is_needed_somewhere(draw: Draw, winner: str) -> None:
    families = alone(drawn_lengths(draw, 0, 512))
    counts = {
        "best fit": len(best_fit(families, MAX_LENGTH, cut=True)),
        "spread": len(spread(families, MAX_LENGTH, fewest_bins(families, MAX_LENGTH))),
    }
    assert len(partition(families, MAX_LENGTH)) == counts.pop(winner) < min(counts.values())


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), max_size=8), st.integers(0, 120))
def test_the_fullest_subset_is_the_best_of_all(sizes: list[int], room: int) -> None:
    subsets = chain.from_iterable(combinations(sizes, count) for count in range(len(sizes) + 1))
    chosen = fullest(sizes, room)
    assert len(set(chosen)) == len(chosen)
    assert sum(sizes[each] for each in chosen) == max(sum(subset) for subset in subsets if sum(subset) <= room)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.lists(st.integers(0, 44), min_size=1, max_size=6)), max_size=12))
def test_bins_filled_to_the_brim_lose_nothing(shapes: list[tuple[int, list[int]]]) -> None:
    families = [Family(prompt, tuple(sorted(members, reverse=True))) for prompt, members in shapes]
    bins = to_the_brim(families, 64)
    assert all(0 < sum(size(families[each], members) for each, members in bin_) <= 64 for bin_ in bins)
    assert all(len({each for each, _ in bin_}) == len(bin_) for bin_ in bins)
    placed = sorted((each, member) for bin_ in bins for each, members in bin_ for member in members)
    assert placed == [(each, member) for each, family in enumerate(families) for member in range(len(family.members))]
    assert len(bins) >= fewest_bins(families, 64) if families else not bins


@pytest.mark.parametrize("seed", range(3))
def test_long_reasoning_fills_what_greedy_rules_leave_empty(seed: int) -> None:
    """Groups of eight log-normal completions, 64 micro-batches of 32,768 tokens: 97 % full and hardly one too many."""
    groups = draw_groups("reasoning", seed=seed, num_tokens=64 * 32_768, group_size=8, scale=8)
    families = [Family(each.prompt, tuple(sorted(each.completions, reverse=True))) for each in groups]
    bins, least = partition(families, 32_768), fewest_bins(families, 32_768)
    held = sum(size(families[each], members) for bin_ in bins for each, members in bin_)
    assert held >= 0.97 * len(bins) * 32_768
    assert least <= len(bins) <= least + 1
    assert len(bins) < min(len(best_fit(families, 32_768, cut=cut)) for cut in (True, False))


def test_families_are_cut_where_that_saves_a_bin_and_only_there() -> None:
    families = [Family(10, (30, 30, 30))] * 2
    assert [sorted(bin_) for bin_ in partition(families, 105)] == [[(0, (0, 1, 2))], [(1, (0, 1, 2))]]
    cut = partition([*families, Family(10, (30, 30))], 150)
    assert [sum(10 + 30 * len(members) for _, members in bin_) for bin_ in cut] == [140, 140]


def test_families_are_cut_so_that_every_rank_has_work() -> None:
    bins = partition([Family(8, (36,) * 8)], 1024, multiple_of=4)
    assert [[len(members) for _, members in bin_] for bin_ in bins] == [[2]] * 4


def test_work_counts_a_shared_prompt_once() -> None:
    assert work(5, (3,)) == work(8, ())
    assert work(5, (3, 3)) == work(8, ()) + work(8, ()) - work(5, ())


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
    assert (moved.layout.max_seqlen, moved.layout.max_keys) == (3, 5)


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
