"""Rewards by name, rewards of others, and what happens to one that misbehaves."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from lambdapo_async.config.sections import DensityConfig
from lambdapo_async.errors import ConfigError, TaskError
from lambdapo_async.objective.extension import load_attribute
from lambdapo_async.tasks.interface import Row
from lambdapo_async.tasks.rewards import resolve_reward
from lambdapo_async.tasks.scoring import NamedReward, score_completions

ROW = Row(prompt="How many?", answer="18", solution="one two three four five six seven eight nine")


def half(row: Row, completions: Sequence[str]) -> list[float]:
    return [0.5 for _ in completions]


def trl_reward(completions: list[str], answer: list[str], **columns: list[str]) -> list[float]:
    assert [len(column) for column in columns.values()] == [len(completions)] * len(columns)
    return [float(ours == theirs) for ours, theirs in zip(completions, answer, strict=True)]


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, str]) -> float:
    return float(solution_str == ground_truth and extra_info["prompt"] == "How many?")


def compute_score_map(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, str]
) -> dict[str, float]:
    return {"score": 0.25, "accuracy": 7.0}


def test_built_in_rewards_by_name() -> None:
    assert resolve_reward("math")(ROW, ["#### $18.00", "19"]) == [1.0, 0.0]
    assert resolve_reward("exact")(ROW, [" 18\n", "I say\n#### 18", "18.0"]) == [1.0, 1.0, 0.0]
    assert resolve_reward("arithmetic")(ROW, ["#### 18", "18"]) == [1.0, 0.0]


def test_ones_own_reward_by_dotted_path() -> None:
    reward = resolve_reward(f"{__name__}:half")
    assert reward.name == f"{__name__}:half"
    assert reward(ROW, ["a", "b"]) == [0.5, 0.5]


@pytest.mark.parametrize(
    ("name", "expected"), [("trl_reward", [1.0, 0.0]), ("compute_score", [1.0, 0.0]), ("compute_score_map", [0.25] * 2)]
)
def test_rewards_written_for_others(name: str, expected: list[float]) -> None:
    style = "trl" if name.startswith("trl") else "verl"
    assert resolve_reward(f"{style}:{__name__}:{name}")(ROW, ["18", "19"]) == expected


def one_argument(completions: Sequence[str]) -> list[float]:
    return [1.0] * len(completions)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maths", "no reward 'maths': did you mean 'math'"),
        ("zzz", "no reward 'zzz': there are math, exact, arithmetic"),
        ("no_such_module:f", "cannot import 'no_such_module'.*PYTHONPATH"),
        (":f", "cannot import ''"),
        (f"{__name__}:haalf", "has no function 'haalf'; did you mean 'half'"),
        (f"{__name__}:one_argument", r"is not a function of \(row, completions\): too many"),
        (f"{__name__}:ROW", "has no function 'ROW'"),
        ("nemo:a.b:c", "no adapter 'nemo'; there are trl, verl"),
    ],
)
def test_a_reward_that_is_not_there(name: str, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        resolve_reward(name)


@pytest.mark.parametrize(
    ("code", "raised"),
    [("def f(:\n", "SyntaxError: "), ("raise RuntimeError('no licence')\n", "RuntimeError: no licence")],
)
def test_a_module_that_raises_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, raised: str
) -> None:
    name = f"raises_{len(code)}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(TaskError, match=f"importing {name} raised {raised}"):
        resolve_reward(f"{name}:f")
    with pytest.raises(ConfigError, match=f"importing {name} raised {raised}"):
        load_attribute(f"{name}:f", field="x")


def test_a_module_that_does_not_import_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wants_more.py").write_text("import surely_not_installed\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(TaskError, match="cannot import 'wants_more': No module named 'surely_not_installed'"):
        resolve_reward("wants_more:f")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "'broken' gave 1 values for 2 completions"),
        ([0.0, 1.5], r"'broken' must give finite values in \[0, 1\]"),
        ([0.0, -0.1], r"'broken' must give finite values in \[0, 1\]"),
        ([0.0, float("nan")], r"'broken' must give finite values in \[0, 1\]"),
        ([0.0, "good"], "'broken' raised ValueError: could not convert"),
    ],
)
def test_values_are_checked(values: list[float], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        NamedReward("broken", lambda row, completions: values)(ROW, ["a", "b"])


def test_a_reward_that_raises_is_named_and_its_error_is_the_cause() -> None:
    def broken(row: Row, completions: Sequence[str]) -> list[float]:
        raise KeyError("colour")

    with pytest.raises(TaskError, match="'broken' raised KeyError: 'colour'") as caught:
        NamedReward("broken", broken)(ROW, ["a"])
    assert isinstance(caught.value.__cause__, KeyError)


def test_verifiable_is_the_product_and_parts_are_named() -> None:
    rewards = [NamedReward("half", half), resolve_reward("exact")]
    right, wrong = score_completions(ROW, ["18", "19"], rewards, DensityConfig())
    assert (right.reward, dict(right.parts)) == (0.5, {"verifiable": 0.5, "half": 0.5, "exact": 1.0})
    assert (wrong.reward, dict(wrong.parts)) == (0.0, {"verifiable": 0.0, "half": 0.5, "exact": 0.0})


def test_density_joins_the_reward_of_wrong_answers_only() -> None:
    density = DensityConfig(gate="wrong", metric="multiset", lam=0.2)
    rewards = [resolve_reward("exact")]
    right, close, far = score_completions(
        ROW, ["one two three four five\n#### 18", f"{ROW.solution}\n#### 19", "#### 19"], rewards, density
    )
    assert right.reward == 1.0
    assert 0.0 < right.parts["density"] < 1.0
    assert (close.reward, close.parts["density"]) == (pytest.approx(0.2), 1.0)
    assert (far.reward, far.parts["density"]) == (0.0, 0.0)


@pytest.mark.parametrize("solution", [None, "too short"])
def test_a_reference_that_is_missing_or_short_is_counted(solution: str | None) -> None:
    row = Row(prompt="", answer="18", solution=solution)
    (scored,) = score_completions(row, ["19"], [resolve_reward("exact")], DensityConfig(gate="wrong"))
    assert dict(scored.parts) == {"verifiable": 0.0, "exact": 0.0, "density_skipped": 1.0}
