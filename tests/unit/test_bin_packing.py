"""Filling bins: nothing lost, hardly one bin too many, and prompts repeated only where that saves one."""

import math
from collections.abc import Callable
from itertools import chain, combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.lengths import draw_groups
from lambdapo_async.bin_packing import (
    LINEAR_TOKENS,
    Family,
    best_fit,
    fewest_bins,
    fullest,
    partition,
    spread,
    to_the_brim,
    work,
)

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
    families = [Family(32, (224,) * 8)] * 18  # tokens alone would fit in 17 bins, completions nine by nine in 16
    assert fewest_bins(families, 2048) == len(partition(families, 2048)) == 18
    assert fewest_bins([Family(32, (224,) * 9)] * 5, 2048) == 5
    assert fewest_bins([Family(0, (224,) * 8)] * 9, 2048) == 8
    lone = Family(32, (224,))
    assert fewest_bins([*families, lone], 2048) == 19
    assert fewest_bins([*[Family(32, (224,) * 9)] * 9, lone], 2048) == 10


def test_a_family_too_large_for_a_bin_counts_its_prompt_in_each() -> None:
    """Two completions of 20 beside a prompt of 60 fill a bin; the third of the large family has no room for 21 more."""
    families = [Family(60, (20,) * 5), Family(1, (20,))]
    assert fewest_bins(families, 100) == len(partition(families, 100)) == 4


@pytest.mark.parametrize(
    ("lengths", "bins"),
    [
        ([7, 5, 1], 2),  # 13 tokens
        ([7, 7, 7, 1], 3),  # no two of the first in 12, though 22 tokens fit in two
        ([*[5] * 7, 1], 4),  # two of the first at most, though 36 tokens fit in three
        ([4, 4, 4], 1),
    ],
)
def test_the_bound_of_a_few_lengths_in_bins_of_12(lengths: list[int], bins: int) -> None:
    assert fewest_bins(alone(lengths), 12) == bins == exhaustive_count(lengths, 12)


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


def test_attention_costs_as_much_as_the_matrices_where_it_is_said_to() -> None:
    assert work(LINEAR_TOKENS, ()) == 2 * LINEAR_TOKENS**2


def test_work_counts_a_shared_prompt_once() -> None:
    assert work(5, (3,)) == work(8, ())
    assert work(5, (3, 3)) == work(8, ()) + work(8, ()) - work(5, ())
