"""Column addition with written working: a task that a model of a million parameters learns in minutes.

478+385=          prompt
8+5=13            one line per column from the right, the carry as a third summand
7+8+1=16
4+3+1=8
#### 863          the final answer, marked as in GSM8K
"""

import random
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice

from lambdapo_async.config import RunConfig
from lambdapo_async.config.sections import ArithmeticTask
from lambdapo_async.errors import TaskError
from lambdapo_async.tasks.interface import Row, Scored
from lambdapo_async.tasks.scoring import NamedReward, score_completions

ANSWER_MARK = "#### "


class Arithmetic:
    """Sums of two numbers of ``digits`` digits each, made from the run's seed; none is in both splits."""

    def __init__(self, section: ArithmeticTask, config: RunConfig) -> None:
        _check_enough_sums(section)
        self._section, self._seed, self._density = section, config.seed, config.density
        self._rewards = (NamedReward("arithmetic", score_arithmetic),)

    def train_rows(self) -> Sequence[Row]:
        """``num_train`` rows."""
        return self._rows[self._section.num_heldout :]

    def heldout_rows(self) -> Sequence[Row]:
        """``num_heldout`` rows, the same ones whatever ``num_train`` is."""
        return self._rows[: self._section.num_heldout]

    def render(self, row: Row) -> str:
        """The sum on a line of its own; the working starts on the next one."""
        return f"{row.prompt}\n"

    def score(self, row: Row, completions: Sequence[str]) -> list[Scored]:
        """1 for the right final answer after ``####``, 0 for anything else; and density."""
        return score_completions(row, completions, self._rewards, self._density)

    @cached_property
    def _rows(self) -> list[Row]:
        sums = _draw_sums(self._section.digits, random.Random(self._seed))
        return [sum_row(*pair) for pair in islice(sums, self._section.num_heldout + self._section.num_train)]


def sum_row(left: int, right: int) -> Row:
    """The row that asks for ``left + right``."""
    return Row(prompt=f"{left}+{right}=", answer=str(left + right), solution=_solution(left, right))


def slipped_solution(row: Row, source: random.Random) -> str:
    """A solution of ``row`` with one wrong column, off by one or by a carry, and everything after it consistent."""
    left, right = row.prompt.rstrip("=").split("+")
    slip = (source.randrange(max(len(left), len(right))), source.random())
    return _solution(int(left), int(right), slip=slip)


def score_arithmetic(row: Row, completions: Sequence[str]) -> list[float]:
    """1 where the last line is ``#### answer``, digit for digit; 0 elsewhere."""
    expected = f"{ANSWER_MARK}{row.answer}"
    return [float(completion.rstrip().rpartition("\n")[2] == expected) for completion in completions]


def _solution(left: int, right: int, *, slip: tuple[int, float] | None = None) -> str:
    """Working and final answer.

    Args:
        left: first summand.
        right: second summand.
        slip: the column (0 is the rightmost) whose total is wrong, and a draw from [0, 1) that decides how.
    """
    width = max(len(str(left)), len(str(right)))
    lines, digits, carry = [], "", 0
    for column, (above, below) in enumerate(zip(f"{left:0{width}}"[::-1], f"{right:0{width}}"[::-1], strict=True)):
        total = int(above) + int(below) + carry
        if slip is not None and slip[0] == column:
            total = _wrong_total(total, slip[1])
        lines.append(f"{above}+{below}{'+1' if carry else ''}={total}")
        carry, digits = total // 10, f"{total % 10}{digits}"
    return "\n".join([*lines, f"{ANSWER_MARK}{int(f'{carry}{digits}')}"])


def _wrong_total(total: int, draw: float) -> int:
    """``total`` off by 1 or 10, and still a total that two digits and a carry can have (0 to 19)."""
    wrong = [total + error for error in (-10, -1, 1, 10) if 0 <= total + error <= 19]
    return wrong[int(draw * len(wrong))]


def _check_enough_sums(section: ArithmeticTask) -> None:
    num_sums = (9 * 10 ** (section.digits - 1)) ** 2
    wanted = section.num_train + section.num_heldout
    if wanted > num_sums // 2:  # beyond this, drawing without repeats gets slow, and rows stop being a sample
        raise TaskError(
            f"task.digits = {section.digits} gives {num_sums} different sums, but num_train + num_heldout = {wanted} "
            "may be at most half of them: raise digits or lower num_train"
        )


def _draw_sums(digits: int, source: random.Random) -> Iterator[tuple[int, int]]:
    """Endless pairs of numbers with ``digits`` digits, none twice."""
    smallest, end = 10 ** (digits - 1), 10**digits
    drawn: set[tuple[int, int]] = set()
    while True:
        pair = (source.randrange(smallest, end), source.randrange(smallest, end))
        if pair not in drawn:
            drawn.add(pair)
            yield pair
