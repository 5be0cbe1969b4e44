"""Rows of JSON-lines files: what is read, and errors that name the place."""

import json
from pathlib import Path

import pytest

from lambdapo_async.config import RunConfig
from lambdapo_async.errors import TaskError
from lambdapo_async.tasks.interface import Row, Task
from lambdapo_async.tasks.registry import build_task

GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k"
DUCKS = "She sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\nShe makes 9 * 200 = $<<9*200=1800>>1800.\n#### 1,800"


def task_of(train: Path, *, heldout: Path | None = None, density: str = "off", **section: object) -> Task:
    return build_task(
        RunConfig.model_validate(
            {
                "model": {"path": "starter"},
                "task": {"kind": "jsonl", "train_path": str(train), "heldout_path": str(heldout or train), **section},
                "density": {"gate": density, "metric": "rouge_l"},
            }
        )
    )


def written(folder: Path, *rows: object) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def test_fields_are_named_by_the_config(tmp_path: Path) -> None:
    path = written(tmp_path, {"q": "2+2?", "a": 4, "why": "2+2=4"})
    task = task_of(path, prompt_field="q", answer_field="a", solution_field="why", template="Q: {prompt}\nA:")
    assert list(task.train_rows()) == [Row(prompt="2+2?", answer="4", solution="2+2=4")]
    assert task.render(task.train_rows()[0]) == "Q: 2+2?\nA:"


def test_braces_in_a_prompt_are_text(tmp_path: Path) -> None:
    task = task_of(written(tmp_path, {"question": "{answer} {0}", "answer": "x"}), template="<{prompt}>")
    assert task.render(task.train_rows()[0]) == "<{answer} {0}>"


def test_gsm8k_answers_lose_mark_commas_and_calculator_notes(tmp_path: Path) -> None:
    task = task_of(
        written(tmp_path, {"question": "Ducks?", "answer": DUCKS}), answer_format="gsm8k", solution_field="answer"
    )
    (row,) = task.train_rows()
    assert row.answer == "1800"
    assert row.solution == "She sells 16 - 3 - 4 = 9 eggs.\nShe makes 9 * 200 = $1800."


def test_max_rows_is_per_file_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"question": "a", "answer": "1"}\n\n{"question": "b", "answer": "2"}\n{bad json\n')
    assert [row.prompt for row in task_of(path, max_rows=2).train_rows()] == ["a", "b"]


def test_no_file_is_read_before_rows_are_asked_for(tmp_path: Path) -> None:
    task = task_of(tmp_path / "absent.jsonl", rewards=["exact"])
    assert task.score(Row(prompt="", answer="4"), ["4"])[0].reward == 1.0
    with pytest.raises(TaskError, match=r"absent\.jsonl: no such file"):
        task.train_rows()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"rows\.jsonl:2: not valid JSON"),
        ("[1]", r"rows\.jsonl:2: a row is a JSON object, got list"),
        ('{"questoin": "x", "answer": "1"}', r"rows\.jsonl:2: no field 'question'; did you mean 'questoin'\?"),
        ('{"question": "x", "b": "1"}', r"rows\.jsonl:2: no field 'answer'; it has 'question', 'b'"),
        ('{"question": ["x"], "answer": "1"}', r"rows\.jsonl:2: field 'question' must be text or a number, got list"),
        ('{"question": "x", "answer": null}', r"rows\.jsonl:2: field 'answer' must be text or a number, got NoneType"),
        pytest.param("[" * 100_000, r"rows\.jsonl:2: not valid JSON", id="nested"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"question": "a", "answer": "1"}}\n{line}\n')
    with pytest.raises(TaskError, match=message):
        task_of(path).train_rows()


@pytest.mark.parametrize("answer", ["no mark", "mark ####  "])
def test_a_gsm8k_answer_needs_its_mark(tmp_path: Path, answer: str) -> None:
    path = written(tmp_path, {"question": "a", "answer": answer})
    with pytest.raises(TaskError, match=r"rows\.jsonl:1: field 'answer' has no answer after ####"):
        task_of(path, answer_format="gsm8k").train_rows()


def test_an_empty_file_a_folder_and_bytes_are_errors(tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty.jsonl", tmp_path / "binary.jsonl"
    empty.write_text("\n")
    binary.write_bytes(b'{"question": "\xff"}\n')
    for path, message in ((empty, "holds no row"), (tmp_path, "cannot be read"), (binary, "cannot be read as UTF-8")):
        with pytest.raises(TaskError, match=message):
            task_of(path).heldout_rows()


def test_real_gsm8k_rows() -> None:
    if not GSM8K.is_dir():
        pytest.skip(f"no GSM8K files in {GSM8K}")
    task = task_of(
        GSM8K / "train.jsonl",
        heldout=GSM8K / "test.jsonl",
        answer_format="gsm8k",
        solution_field="answer",
        density="wrong",
    )
    train, heldout = task.train_rows(), task.heldout_rows()
    assert (len(train), len(heldout)) == (7473, 1319)
    for row in [*train, *heldout]:
        assert row.solution is not None
        assert "<<" not in row.solution
        assert "####" not in row.solution
        float(row.answer)
    right = task.score(train[0], [f"{train[0].solution}\n#### {train[0].answer}", "#### 1"])
    assert [score.parts["verifiable"] for score in right] == [1.0, 0.0]
    assert [score.parts["density"] for score in right] == [1.0, 0.0]
