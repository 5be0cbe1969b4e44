"""From a row and completions to R: the product of the verifiable rewards, joined with density."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lambdapo_async.config.sections import DensityConfig
from lambdapo_async.errors import TaskError
from lambdapo_async.objective.density import combine, semantic_density
from lambdapo_async.tasks.interface import RewardFunction, Row, Scored


@dataclass(frozen=True, slots=True)
class NamedReward:
    """A reward function under the name that configs, errors and reward parts use."""

    name: str
    function: RewardFunction

    def __call__(self, row: Row, completions: Sequence[str]) -> list[float]:
        """One reward in [0, 1] per completion.

        Raises:
            TaskError: the function raised (its exception is the cause), or answered with anything else.
        """
        try:
            rewards = [float(reward) for reward in self.function(row, completions)]
        except Exception as error:  # the user's code may raise anything; none of it is swallowed
            raise TaskError(f"reward {self.name!r} raised {type(error).__name__}: {error}") from error
        if len(rewards) != len(completions):
            raise TaskError(f"reward {self.name!r} gave {len(rewards)} values for {len(completions)} completions")
        if not all(math.isfinite(reward) and 0.0 <= reward <= 1.0 for reward in rewards):
            raise TaskError(f"reward {self.name!r} must give finite values in [0, 1], got {rewards!r:.200}")
        return rewards


def score_completions(
    row: Row, completions: Sequence[str], rewards: Sequence[NamedReward], density: DensityConfig
) -> list[Scored]:
    """R of each completion and its parts: ``verifiable`` (V), each reward by name, ``density``.

    Where density is on but this row has no reference solution, or too short a one, ``density_skipped`` is 1.
    """
    columns = {reward.name: reward(row, completions) for reward in rewards}
    return [
        _scored(row, completion, {name: column[i] for name, column in columns.items()}, density)
        for i, completion in enumerate(completions)
    ]


def _scored(row: Row, completion: str, by_name: dict[str, float], config: DensityConfig) -> Scored:
    verifiable = math.prod(by_name.values())
    parts = {"verifiable": verifiable, **by_name}
    density = semantic_density(completion, row.solution, config)
    if density is not None:
        parts["density"] = density
    elif config.gate != "off":
        parts["density_skipped"] = 1.0
    return Scored(combine(verifiable, density, config), parts)
