"""Column addition: rows that are right, slips that are wrong, and a score that knows the difference."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lambdapo_async.config import RunConfig
from lambdapo_async.errors import TaskError
from lambdapo_async.tasks.arithmetic import Arithmetic, score_arithmetic, slipped_solution, sum_row
from lambdapo_async.tasks.interface import Task
from lambdapo_async.tasks.registry import build_task


def task_with(*, seed: int = 0, density: str = "off", **section: int) -> Task:
    return build_task(
        RunConfig.model_validate(
            {
                "seed": seed,
                "model": {"path": "starter"},
                "task": {"kind": "arithmetic", "num_train": 300, "num_heldout": 40, **section},
                "density": {"gate": density},
            }
        )
    )


def test_a_row_shows_its_working() -> None:
    row = sum_row(478, 385)
    assert (row.prompt, row.answer) == ("478+385=", "863")
    assert row.solution == "8+5=13\n7+8+1=16\n4+3+1=8\n#### 863"
    assert task_with().render(row) == "478+385=\n"


@given(st.integers(0, 99_999), st.integers(0, 99_999))
def test_every_line_of_a_solution_is_true(left: int, right: int) -> None:
    *lines, final = (sum_row(left, right).solution or "").split("\n")
    for line in lines:
        summands, _, total = line.partition("=")
        assert sum(map(int, summands.split("+"))) == int(total)
    assert len(lines) == max(len(str(left)), len(str(right)))
    assert final == f"#### {left + right}"


@given(st.integers(100, 999), st.integers(100, 999), st.integers())
def test_a_slipped_solution_has_one_wrong_column_and_a_wrong_answer(left: int, right: int, seed: int) -> None:
    row = sum_row(left, right)
    slipped = slipped_solution(row, random.Random(seed))
    *lines, final = slipped.split("\n")
    wrong = [line for line in lines if sum(map(int, line.split("=")[0].split("+"))) != int(line.split("=")[1])]
    assert len(wrong) == 1
    assert re.fullmatch(r"#### \d+", final)
    assert score_arithmetic(row, [slipped, row.solution or ""]) == [0.0, 1.0]


def test_rows_come_from_the_seed_and_splits_are_disjoint() -> None:
    task = task_with(seed=3)
    train, heldout = task.train_rows(), task.heldout_rows()
    assert (len(train), len(heldout)) == (300, 40)
    assert len({row.prompt for row in [*train, *heldout]}) == 340
    assert train == task_with(seed=3).train_rows()
    assert train != task_with(seed=4).train_rows()


def test_heldout_rows_do_not_depend_on_the_number_of_training_rows() -> None:
    assert task_with(num_train=10).heldout_rows() == task_with(num_train=400).heldout_rows()


@pytest.mark.parametrize("digits", [2, 3, 12])
def test_summands_have_the_configured_digits(digits: int) -> None:
    assert all(
        re.fullmatch(rf"\d{{{digits}}}\+\d{{{digits}}}=", row.prompt) for row in task_with(digits=digits).train_rows()
    )


def test_more_rows_than_there_are_sums_is_an_error() -> None:
    with pytest.raises(TaskError, match=r"task\.digits = 1 gives 81 different sums.* = 340 .*raise digits"):
        task_with(digits=1)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("#### 863", 1.0),
        ("8+5=13\n#### 863\n", 1.0),
        ("#### 864", 0.0),
        ("#### 0863", 0.0),
        ("863", 0.0),
        ("#### 863\n#### 1", 0.0),
        ("", 0.0),
    ],
)
def test_only_the_final_line_counts(completion: str, expected: float) -> None:
    assert score_arithmetic(sum_row(478, 385), [completion]) == [expected]


def test_density_rewards_working_that_is_right_up_to_a_slip() -> None:
    row = sum_row(478, 385)
    slipped, guessed = task_with(density="wrong").score(row, ["8+5=13\n7+8+1=17\n4+3+1=8\n#### 873", "#### 873"])
    assert slipped.parts["verifiable"] == guessed.parts["verifiable"] == 0.0
    assert slipped.reward == pytest.approx(0.1 * slipped.parts["density"])
    assert slipped.parts["density"] > 0.8 > guessed.parts["density"]


def test_the_task_is_arithmetic() -> None:
    assert isinstance(task_with(), Arithmetic)
