"""Column addition with written working: a task that a one-million-parameter model can learn in minutes.

    478+385=          prompt
    8+5=13            one line per column from the right, the carry as a third summand
    7+8+1=16
    4+3+1=8
    #### 863          the final answer, marked as in GSM8K
"""

import random
from collections.abc import Iterator, Sequence
from itertools import islice

from lambdapo_async.config import RunConfig
from lambdapo_async.config.sections import ArithmeticTask
from lambdapo_async.errors import TaskError
from lambdapo_async.tasks.interface import Row, Scored
from lambdapo_async.tasks.rewards import NamedReward
from lambdapo_async.tasks.scoring import score_completions

ANSWER_MARK = "#### "


class Arithmetic:
    """Rows made from the run's seed; no sum is in both splits."""

    def __init__(self, section: ArithmeticTask, config: RunConfig) -> None:
        self._rewards = (NamedReward("arithmetic", score_arithmetic),)
        self._density = config.density
        sums = _distinct_sums(section, seed=config.seed)
        # Held-out rows come first, so that they stay the same when num_train changes.
        self._heldout = [make_row(*pair) for pair in islice(sums, section.num_heldout)]
        self._train = [make_row(*pair) for pair in islice(sums, section.num_train)]

    def train_rows(self) -> Sequence[Row]:
        """``num_train`` rows."""
        return self._train

    def heldout_rows(self) -> Sequence[Row]:
        """``num_heldout`` rows."""
        return self._heldout

    def render(self, row: Row) -> str:
        """The sum on a line of its own; the working starts on the next one."""
        return f"{row.prompt}\n"

    def score(self, row: Row, completions: Sequence[str]) -> list[Scored]:
        """1 for the right final answer after ``####``, 0 for anything else; plus density."""
        return score_completions(row, completions, self._rewards, self._density)


def make_row(left: int, right: int) -> Row:
    """The row that asks for ``left + right``."""
    answer = str(left + right)
    working = "\n".join(_column_lines(str(left), str(right)))
    return Row(prompt=f"{left}+{right}=", answer=answer, solution=f"{working}\n{ANSWER_MARK}{answer}")


def score_arithmetic(row: Row, completions: Sequence[str]) -> list[float]:
    """1 where the last line is ``#### answer``, digit for digit; 0 elsewhere."""
    expected = f"{ANSWER_MARK}{row.answer}"
    return [float(completion.rstrip().rpartition("\n")[2] == expected) for completion in completions]


def _column_lines(left: str, right: str) -> Iterator[str]:
    width = max(len(left), len(right))
    carry = 0
    for above, below in zip(reversed(left.zfill(width)), reversed(right.zfill(width)), strict=True):
        total = int(above) + int(below) + carry
        yield f"{above}+{below}{'+1' if carry else ''}={total}"
        carry = total // 10


def _distinct_sums(section: ArithmeticTask, *, seed: int) -> Iterator[tuple[int, int]]:
    """Endless pairs of summands, uniform below 10**digits, none twice.

    Raises:
        TaskError: more rows are wanted than half of the pairs there are, so drawing would take for ever.
    """
    limit = 10**section.digits
    wanted = section.num_train + section.num_heldout
    if wanted > limit * limit // 2:
        raise TaskError(
            f"task.digits = {section.digits} gives {limit * limit} different sums, too few for "
            f"num_train + num_heldout = {wanted} (at most half): raise digits or lower num_train"
        )
    return _draw(limit, random.Random(seed))


def _draw(limit: int, source: random.Random) -> Iterator[tuple[int, int]]:
    drawn: set[tuple[int, int]] = set()
    while True:
        pair = (source.randrange(limit), source.randrange(limit))
        if pair not in drawn:
            drawn.add(pair)
            yield pair
