"""Final answers: where they stand, when two are equal, and that none of them hangs."""

import json
from pathlib import Path

import pytest

from lambdapo_async.tasks.interface import Row
from lambdapo_async.tasks.maths import final_answer, same_answer, score_exact, score_math

GSM8K_SOLUTIONS = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k" / "model_solutions.jsonl"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5 apples.\n#### 18", "18"),
        ("#### 18\nwait, 19", "18"),
        ("#### 17\n#### 18", "18"),
        ("so 2\nA: 18 dollars", "18 dollars"),
        ("The answer is 42.", "42."),
        ("Final answer: x = 3", "x = 3"),
        (r"thus \boxed{\frac{1}{2}} of 7", r"\frac{1}{2}"),
        (r"The answer is \boxed{7}.", "7"),
        (r"\boxed{3} no \boxed{4}", "4"),
        (r"open \boxed{5", "5"),
        ("first 7, then 1,234.5 in all.", "1,234.5"),
        ("7-3=4", "4"),
        ("it is -5", "-5"),
        ("nothing", None),
        ("", None),
    ],
)
def test_where_the_final_answer_stands(text: str, expected: str | None) -> None:
    assert final_answer(text) == expected


@pytest.mark.parametrize(
    ("expected", "found"),
    [
        ("1234", "1,234"),
        ("1,234", "1234.00"),
        ("18", "$18"),
        ("18", "18.0"),
        ("18", r"\$18"),
        ("18", "18 dollars per day."),
        ("18", "18%"),
        ("-5", "-$5"),
        ("-5", "$-5"),
        ("0.5", ".5"),
        ("1/2", "0.5"),
        (r"\frac{3}{4}", "0.75"),
        ("x^2+1", "1+x^2"),
        (r"2\sqrt{2}", r"\sqrt{8}"),
    ],
)
def test_equal_answers(expected: str, found: str) -> None:
    assert same_answer(expected, found)


@pytest.mark.parametrize(
    ("expected", "found"),
    [
        ("200", "-200"),
        ("18", "180"),
        ("1234", "1,23"),
        ("5", "x-5"),
        ("2", "x^2"),
        ("18", "18 or 20"),
        ("18", "eighteen"),
        ("18", ""),
        ("18", None),
        ("1/3", "0.33"),
    ],
)
def test_different_answers(expected: str, found: str | None) -> None:
    assert not same_answer(expected, found)


@pytest.mark.parametrize(
    "text",
    [
        "9**9**9**9",
        "9^{9^{9}}",
        "(9^9)^(9^(9^9))",
        "9^999999999",
        "9^{-999999999}",
        "99999999!",
        "9!!!",
        "1e999999999",
        "(" * 190,
        "}{{{" + r"\frac" * 30,
        "1" * 100_000,
        r"\int \sum \\\\ $$$",
        "\x00\ud800",
    ],
)
@pytest.mark.timeout(15)
def test_hard_answers_are_wrong_and_do_not_hang(text: str) -> None:
    assert score_math(Row(prompt="", answer="18"), [f"#### {text}", rf"\boxed{{{text}}}"]) == [0.0, 0.0]


@pytest.mark.timeout(15)
@pytest.mark.parametrize(
    "text", [" \n" * 50_000, "####" * 50_000, "1," * 50_000, "\\boxed{" * 20_000, "A: \n" * 50_000]
)
def test_long_texts_are_read_in_linear_time(text: str) -> None:
    assert score_math(Row(prompt="", answer="18"), [text]) == [0.0]


def test_exact_is_to_the_character() -> None:
    assert score_exact(Row(prompt="", answer="Paris"), ["Paris\n", "#### Paris", "paris", "A: Paris."]) == [1, 1, 0, 0]


def test_agrees_with_the_labels_of_real_model_solutions() -> None:
    """659 questions, four solutions each, labelled by the authors of GSM8K."""
    if not GSM8K_SOLUTIONS.is_file():
        pytest.skip(f"no {GSM8K_SOLUTIONS}")
    agreed = []
    for line in GSM8K_SOLUTIONS.read_text(encoding="utf-8").splitlines():
        fields = json.loads(line)
        row = Row(prompt=fields["question"], answer=final_answer(fields["ground_truth"]) or "")
        solutions = [value for value in fields.values() if isinstance(value, dict)]
        scores = score_math(row, [solution["solution"] for solution in solutions])
        agreed += [score == solution["is_correct"] for score, solution in zip(scores, solutions, strict=True)]
    assert len(agreed) == 2636
    assert all(agreed)
