"""Density: equal to the textbook's LCS, blind to verbosity, and right about real solutions."""

import json
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lambdapo_async.config.sections import DensityConfig
from lambdapo_async.objective.density import Metric, combine, density, reasoning_trace, semantic_density
from tests.reference.density import common_subsequence

METRICS: tuple[Metric, ...] = ("numbers", "rouge_l", "multiset")
SHARED_DATA = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"
SOLUTION = "She eats 16 - 3 = 13 eggs.\nShe sells 13 * 2 = 26 dollars of them each day.\n#### 26"

words = st.lists(st.sampled_from(["a", "b", "c", "12", "7"]), max_size=12)


@settings(deadline=None)
@given(words, words)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(ours: list[str], theirs: list[str]) -> None:
    expected = 2 * common_subsequence(ours, theirs) / (len(ours) + len(theirs)) if ours and theirs else 0.0
    assert density(" ".join(ours), " ".join(theirs), metric="rouge_l") == pytest.approx(expected)


def test_known_values() -> None:
    assert density("police killed the gunman", "the police killed", metric="rouge_l") == pytest.approx(4 / 7)
    assert density("Police killed the GUNMAN", "The police killed", metric="multiset") == pytest.approx(6 / 7)
    assert density("3 + 4 = 7, so 7 * 2 = 14", "3 + 4 = 7 and 14", metric="numbers") == pytest.approx(2 * 4 / 10)


@settings(deadline=None)
@given(st.text(max_size=60), st.text(max_size=60), st.sampled_from(METRICS))
def test_symmetric_and_bounded(ours: str, theirs: str, metric: Metric) -> None:
    value = density(ours, theirs, metric=metric)
    assert 0.0 <= value <= 1.0
    assert value == density(theirs, ours, metric=metric)


@pytest.mark.parametrize("metric", METRICS)
def test_the_reference_itself_scores_one_and_silence_zero(metric: Metric) -> None:
    assert density(SOLUTION, SOLUTION, metric=metric) == 1.0
    for nothing in ("", "\n\n", "#### 26", "???"):
        assert density(nothing, SOLUTION, metric=metric) == 0.0
        assert density(SOLUTION, nothing, metric=metric) == 0.0


@pytest.mark.parametrize("metric", METRICS)
def test_verbosity_does_not_pay(metric: Metric) -> None:
    attempt = "She eats 3 of 16 eggs, 13 are left, she sells 13 for 2 dollars each."
    once = density(attempt, SOLUTION, metric=metric)
    assert once > 0
    assert density("\n".join([attempt] * 3), SOLUTION, metric=metric) < once
    assert density(attempt + " also 5 6 7 8 9 and other words" * 5, SOLUTION, metric=metric) < once


@pytest.mark.parametrize(
    "line",
    ["#### 18", "A: 18", "a:18", "Answer: 18", "Final answer: 18", "The answer is 18.", r"So \boxed{18}.", " A: 18"],
)
def test_the_final_answer_is_not_reasoning(line: str) -> None:
    assert reasoning_trace(f"9 * 2 = 18\n{line}\n\n") == "9 * 2 = 18\n"
    assert density(f"nothing\n{line}", "9 * 2 = 18\n#### 18", metric="numbers") == 0.0


def test_only_the_last_line_is_an_answer() -> None:
    text = "A: dog has 4 legs\n#### not the end\nso 4 legs"
    assert reasoning_trace(text) == text


def test_calculator_annotations_are_markup() -> None:
    assert reasoning_trace("16 - 3 = <<16-3=13>>13 eggs, 1 << 2") == "16 - 3 = 13 eggs, 1 << 2"


def test_numbers_are_compared_by_value() -> None:
    assert density("1,000 and 2.50 and 007 and 0.0", "1000 2.5 7 0", metric="numbers") == 1.0
    assert density("12,34 1234,567", "12 34 1234 567", metric="numbers") == 1.0
    assert density("2.5 12 0", "25 2 13 1", metric="numbers") == 0.0
    assert density("1" * 5000, "1" * 5000, metric="numbers") == 1.0


@pytest.mark.parametrize(
    ("gate", "verifiable", "value", "expected"),
    [
        ("wrong", 0.0, 0.5, 0.05),
        ("wrong", 1.0, 0.5, 1.0),
        ("wrong", 0.5, 1.0, 0.55),
        ("always", 1.0, 0.5, 1.05),
        ("off", 0.0, 0.5, 0.0),
        ("wrong", 0.25, None, 0.25),
        ("always", 0.25, None, 0.25),
    ],
)
def test_combine(gate: str, verifiable: float, value: float | None, expected: float) -> None:
    assert combine(verifiable, value, DensityConfig(gate=gate, lam=0.1)) == pytest.approx(expected)


@given(st.floats(0, 1), st.floats(0, 1))
def test_a_wrong_answer_never_beats_a_right_one(better: float, worse: float) -> None:
    config = DensityConfig(gate="wrong", lam=0.2)
    assert combine(0.0, better, config) <= combine(1.0, worse, config) - 0.8 + 1e-12


def test_semantic_density_wants_a_reference_long_enough() -> None:
    config = DensityConfig(gate="wrong", min_reference_tokens=8, metric="rouge_l")
    eight = "one two three four five six seven eight\n#### 8"
    assert semantic_density("one two three four", eight, config) == pytest.approx(2 * 4 / 12)
    assert semantic_density("one two", eight.replace("eight", ""), config) is None
    assert semantic_density("one two", None, config) is None
    assert semantic_density("one two", eight, config.model_copy(update={"gate": "off"})) is None


def ranking_probability(metric: Metric) -> float:
    """P(a model's correct solution scores above a wrong one to the same question), ties counted half."""
    wins = pairs = 0.0
    for line in (SHARED_DATA / "model_solutions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        scores: dict[bool, list[float]] = {True: [], False: []}
        for written in row.values():
            if isinstance(written, dict):
                scores[written["is_correct"]].append(density(written["solution"], row["ground_truth"], metric=metric))
        for right, wrong in product(scores[True], scores[False]):
            wins += (right > wrong) + 0.5 * (right == wrong)
            pairs += 1
    return wins / pairs


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the GSM8K files of ../shared/data are not here")
def test_ranks_real_solutions() -> None:
    assert ranking_probability("numbers") > 0.88
    assert ranking_probability("rouge_l") == pytest.approx(0.764, abs=0.01)
