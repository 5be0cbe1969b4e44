"""How long prompts and completions are: what packing and padding are measured on.

A distribution draws one group: the prompt's length and those of its completions, in tokens. ``scale`` stretches all but
the demo's, so that a GPU gets lengths of real reasoning data and a CPU the same shape, shorter.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lambdapo_async.tasks.arithmetic import slipped_solution, sum_row

SLIP_RATE = 0.75
REASONING_MEDIAN, REASONING_SIGMA, REASONING_CAP = 160, 0.9, 1600
"""A log-normal completion: mean 1.5 medians, one in 25 longer than 5, cut off at 10 as by ``max_tokens``."""
UNIFORM_CAP = 480
EQUAL_PROMPT, EQUAL_COMPLETION = 32, 224


@dataclass(frozen=True, slots=True)
class GroupLengths:
    """One group's lengths in tokens."""

    prompt: int
    completions: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens the learner trains on, the prompt once per completion."""
        return sum(self.prompt + completion for completion in self.completions)


Distribution = Callable[[random.Random, int, int], GroupLengths]
"""(source, group size, scale) -> one group."""


def arithmetic(source: random.Random, group_size: int, scale: int) -> GroupLengths:
    """The demo's sums of three digits with their working, one token per character: about 45, hardly varied."""
    row = sum_row(source.randrange(100, 1000), source.randrange(100, 1000))
    texts = [
        slipped_solution(row, source) if source.random() < SLIP_RATE else row.solution or "" for _ in range(group_size)
    ]
    return GroupLengths(len(row.prompt) + 1, tuple(len(text) + 1 for text in texts))


def reasoning(source: random.Random, group_size: int, scale: int) -> GroupLengths:
    """A log-normal long tail, as of models that think before they answer."""
    drawn = [source.lognormvariate(0.0, REASONING_SIGMA) * REASONING_MEDIAN for _ in range(group_size)]
    return GroupLengths(
        scale * source.randrange(20, 80), tuple(scale * max(1, min(REASONING_CAP, int(one))) for one in drawn)
    )


def uniform(source: random.Random, group_size: int, scale: int) -> GroupLengths:
    """Every length up to a cap equally often."""
    completions = tuple(scale * source.randint(1, UNIFORM_CAP) for _ in range(group_size))
    return GroupLengths(scale * source.randrange(20, 80), completions)


def equal(source: random.Random, group_size: int, scale: int) -> GroupLengths:
    """All alike: nothing for packing to win."""
    return GroupLengths(scale * EQUAL_PROMPT, (scale * EQUAL_COMPLETION,) * group_size)


DISTRIBUTIONS: Mapping[str, Distribution] = MappingProxyType(
    {"arithmetic": arithmetic, "reasoning": reasoning, "uniform": uniform, "equal": equal}
)


def draw_groups(name: str, *, seed: int, num_tokens: int, group_size: int, scale: int) -> list[GroupLengths]:
    """Groups of one distribution, the fewest with at least ``num_tokens`` tokens together."""
    source, groups, drawn = random.Random(seed), [], 0
    while drawn < num_tokens:
        groups.append(DISTRIBUTIONS[name](source, group_size, scale))
        drawn += groups[-1].num_tokens
    return groups


def longest_sequence(groups: list[GroupLengths]) -> int:
    """Tokens of the longest prompt with completion."""
    return max(group.prompt + max(group.completions) for group in groups)
