"""Reward functions by name: ours, the user's own by dotted path, and those written for TRL or verl."""

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lambdapo_async.errors import TaskError
from lambdapo_async.tasks.arithmetic import score_arithmetic
from lambdapo_async.tasks.interface import RewardFunction, Row
from lambdapo_async.tasks.maths import score_exact, score_math
from lambdapo_async.tasks.scoring import NamedReward

REWARDS: Mapping[str, RewardFunction] = {"math": score_math, "exact": score_exact, "arithmetic": score_arithmetic}

TrlReward = Callable[..., Sequence[float]]
"""``def reward(completions, **columns) -> list[float]``; columns: prompts, answer, solution, a list each."""
VerlReward = Callable[[str, str, str, Mapping[str, str | None]], float | Mapping[str, float]]
"""``def compute_score(data_source, solution_str, ground_truth, extra_info) -> float | {"score": float}``."""


def resolve_reward(name: str) -> NamedReward:
    """The reward function called ``name``.

    Args:
        name: ``math``, ``exact`` or ``arithmetic``; ``package.module:function`` of one's own with the signature of
            ``RewardFunction``; ``trl:package.module:function`` or ``verl:package.module:function``.

    Raises:
        TaskError: there is no such name, module or function.
    """
    if ":" not in name:
        return NamedReward(name, _built_in(name))
    style, _, path = name.partition(":")
    if ":" not in path:
        return NamedReward(name, _own(name))
    if style not in _ADAPTERS:
        raise TaskError(f"reward {name!r}: no adapter {style!r}; there are {', '.join(_ADAPTERS)}")
    return NamedReward(name, _ADAPTERS[style](_imported(path)))


def adapt_trl(reward: TrlReward) -> RewardFunction:
    """A reward function of TRL's GRPOTrainer as one of ours; the row's texts become its columns."""

    def score(row: Row, completions: Sequence[str]) -> list[float]:
        size = len(completions)
        columns = {name: [text] * size for name, text in row.as_map().items() if name != "prompt"}
        return list(reward(completions=list(completions), prompts=[row.prompt] * size, **columns))

    return score


def adapt_verl(compute_score: VerlReward) -> RewardFunction:
    """A ``compute_score`` function of verl as one of ours; ``data_source`` is empty, ``extra_info`` the row's texts."""

    def score(row: Row, completions: Sequence[str]) -> list[float]:
        results = [compute_score("", completion, row.answer, row.as_map()) for completion in completions]
        return [result["score"] if isinstance(result, Mapping) else result for result in results]

    return score


_ADAPTERS: Mapping[str, Callable[[Callable[..., Any]], RewardFunction]] = {"trl": adapt_trl, "verl": adapt_verl}


def _built_in(name: str) -> RewardFunction:
    if name in REWARDS:
        return REWARDS[name]
    nearest = difflib.get_close_matches(name, REWARDS, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(REWARDS)}"
    raise TaskError(f"no reward {name!r}: {hint} (your own is named package.module:function)")


def _own(path: str) -> RewardFunction:
    """A function of the user's own with our signature."""
    function = _imported(path)
    try:
        inspect.signature(function).bind("row", "completions")
    except TypeError as error:
        raise TaskError(f"reward {path!r} is not a function of (row, completions): {error}") from None
    return function


def _imported(path: str) -> Callable[..., Any]:
    module_name, _, function_name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise TaskError(f"reward {path!r}: cannot import {module_name!r}: {error}; is it on PYTHONPATH?") from error
    except Exception as error:  # the user's code may raise anything; none of it is swallowed
        raise TaskError(f"reward {path!r}: importing {module_name} raised {type(error).__name__}: {error}") from error
    names = vars(module)
    function: Callable[..., Any] | None = names.get(function_name)
    if callable(function):
        return function
    nearest = difflib.get_close_matches(function_name, [name for name in names if callable(names[name])], n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise TaskError(f"reward {path!r}: {module_name} has no function {function_name!r}{hint}")
