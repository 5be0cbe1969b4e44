"""Rows of JSON-lines files."""

import difflib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path

from lambdapo_async.config import RunConfig
from lambdapo_async.config.sections import JsonlTask
from lambdapo_async.errors import TaskError
from lambdapo_async.tasks.interface import Row, Scored
from lambdapo_async.tasks.rewards import resolve_reward
from lambdapo_async.tasks.scoring import score_completions

GSM8K_MARK = "####"
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")


class JsonlRows:
    """Rows of two files. They are read when first asked for: an actor scores without having them."""

    def __init__(self, section: JsonlTask, config: RunConfig) -> None:
        self._section = section
        self._density = config.density
        self._rewards = tuple(resolve_reward(name) for name in section.rewards)

    def train_rows(self) -> Sequence[Row]:
        """Rows of ``train_path``; ``TaskError`` names the file, line and field that is wrong."""
        return self._train

    def heldout_rows(self) -> Sequence[Row]:
        """Rows of ``heldout_path``; ``TaskError`` names the file, line and field that is wrong."""
        return self._heldout

    def render(self, row: Row) -> str:
        """The row's prompt in ``template``."""
        return self._section.template.replace("{prompt}", row.prompt)

    def score(self, row: Row, completions: Sequence[str]) -> list[Scored]:
        """Product of the configured rewards, and density."""
        return score_completions(row, completions, self._rewards, self._density)

    @cached_property
    def _train(self) -> list[Row]:
        return read_rows(self._section.train_path, self._section)

    @cached_property
    def _heldout(self) -> list[Row]:
        return read_rows(self._section.heldout_path, self._section)


def read_rows(path: Path, section: JsonlTask) -> list[Row]:
    """The first ``max_rows`` rows of ``path``, or all; blank lines are passed over.

    Raises:
        TaskError: a missing or empty file, a line that is no JSON object, or a field that is missing or no text.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            numbered = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
            rows = [_row(line, section, f"{path}:{number}") for number, line in islice(numbered, section.max_rows)]
    except FileNotFoundError:
        raise TaskError(f"{path}: no such file; set task.train_path and task.heldout_path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    if not rows:
        raise TaskError(f"{path}: holds no row")
    return rows


def _row(line: str, section: JsonlTask, place: str) -> Row:
    try:
        fields = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise TaskError(f"{place}: not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise TaskError(f"{place}: a row is a JSON object, got {type(fields).__name__}")
    answer = _text(fields, section.answer_field, place)
    solution = None if section.solution_field is None else _text(fields, section.solution_field, place)
    if section.answer_format == "gsm8k":
        answer = _gsm8k_answer(answer, section.answer_field, place)
        solution = None if solution is None else _gsm8k_solution(solution)
    return Row(prompt=_text(fields, section.prompt_field, place), answer=answer, solution=solution)


def _text(fields: dict[str, object], name: str, place: str) -> str:
    if name not in fields:
        nearest = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"it has {', '.join(map(repr, fields))}"
        raise TaskError(f"{place}: no field {name!r}; {hint}")
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TaskError(f"{place}: field {name!r} must be text or a number, got {type(value).__name__}")
    return str(value)


def _gsm8k_answer(text: str, name: str, place: str) -> str:
    _, mark, answer = text.rpartition(GSM8K_MARK)
    if not mark or not answer.strip():
        raise TaskError(
            f'{place}: field {name!r} has no answer after {GSM8K_MARK}; task.answer_format = "plain" takes it whole'
        )
    return answer.strip().replace(",", "")


def _gsm8k_solution(text: str) -> str:
    """The working before the mark (all of it where there is none), without calculator notes such as ``<<16-3=13>>``."""
    return _CALCULATOR.sub("", text.partition(GSM8K_MARK)[0]).rstrip()
