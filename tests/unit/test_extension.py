"""Objectives of the user's own: imported by the learner alone, refused in one line before anything is touched."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from lambdapo_async.config import RunConfig
from lambdapo_async.config.objective import AdvantageConfig, Surrogate
from lambdapo_async.errors import ConfigError
from lambdapo_async.objective.advantage import estimate_advantages
from lambdapo_async.objective.policy_loss import LossDenominator, policy_loss
from lambdapo_async.objective.presets import PRESETS
from lambdapo_async.objective.resolve import resolve_objective

HERE = "tests.unit.test_extension"


def halved(rewards_BG: Tensor, confidence_BG: Tensor, config: AdvantageConfig) -> Tensor:
    return (rewards_BG - rewards_BG.mean(dim=1, keepdim=True)) / 2


def first_column(rewards_BG: Tensor, confidence_BG: Tensor, config: AdvantageConfig) -> Tensor:
    return rewards_BG[:, :1]


def unclipped(ratio_T: Tensor, logprobs_T: Tensor, advantages_T: Tensor, surrogate: Surrogate) -> tuple[Tensor, Tensor]:
    return ratio_T * advantages_T, torch.zeros_like(ratio_T, dtype=torch.bool)


WIDE = replace(PRESETS["ppo"], surrogate=Surrogate(eps_lo=0.5, eps_hi=0.5))
DECLARED_LATER: object = "no function"


def run(*, updates: int = 1, minibatches: int = 1, **objective: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": "unused", "max_length": 64},
            "task": {"kind": "arithmetic"},
            "sampling": {"max_tokens": 16},
            "learner": {"epochs": updates, "minibatches": minibatches},
            "objective": objective,
        }
    )


def test_an_estimator_of_one_s_own() -> None:
    config = run(advantage={"estimator": f"{HERE}:halved", "center": True})
    resolve_objective(config)
    rewards_BG = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    advantages_BG = estimate_advantages(rewards_BG, torch.zeros(2, 2), config.objective.advantage)
    assert advantages_BG.tolist() == [[0.25, -0.25], [0.0, 0.0]]


def test_an_estimator_must_keep_the_shape() -> None:
    config = AdvantageConfig(estimator=f"{HERE}.first_column")
    with pytest.raises(ConfigError, match=r"made advantages \(3, 1\) of rewards \(3, 2\)"):
        estimate_advantages(torch.zeros(3, 2), torch.zeros(3, 2), config)


def test_a_preset_of_one_s_own_is_overridden_like_any_other() -> None:
    spec = resolve_objective(run(policy_loss={"preset": f"{HERE}:WIDE", "surrogate": {"eps_hi": 0.9}}))
    assert spec == replace(WIDE, surrogate=Surrogate(eps_lo=0.5, eps_hi=0.9))


def test_a_surrogate_of_one_s_own() -> None:
    spec = resolve_objective(run(policy_loss={"preset": "ppo", "surrogate": {"kind": f"{HERE}:unclipped"}}))
    leaf_T = torch.tensor([0.0, -1.0, -9.0], requires_grad=True)
    columns = (torch.tensor([-5.0, -1.0, -9.0]), torch.tensor([-5.0, -1.0, -9.0]), torch.tensor([1.0, -1.0, 1.0]))
    mask_T = torch.tensor([True, True, False])
    result = policy_loss(
        leaf_T, *columns, mask_T, torch.zeros(3, dtype=torch.int64), spec=spec, denominator=LossDenominator(2, 1, 3)
    )
    (gradient_T,) = torch.autograd.grad(result.loss, leaf_T)
    torch.testing.assert_close(gradient_T, torch.tensor([-(torch.e**5) / 2, 0.5, 0.0]))


@pytest.mark.parametrize(
    ("objective", "complaint"),
    [
        (
            {"advantage": {"estimator": "no_such_package:fn"}},
            "advantage.estimator = 'no_such_package:fn': module no_su",
        ),
        ({"advantage": {"estimator": f"{HERE}:missing"}}, "has no missing"),
        ({"advantage": {"estimator": f"{HERE}:DECLARED_LATER"}}, "is a str, expected a function of (rewards_BG, "),
        ({"advantage": {"estimator": f"{HERE}:run"}}, "is not a function of (rewards_BG, confidence_BG, config)"),
        ({"policy_loss": {"preset": f"{HERE}.halved"}}, "is a function, expected a PolicyLossSpec"),
        ({"policy_loss": {"preset": "ppo", "surrogate": {"kind": f"{HERE}:halved"}}}, "surrogate.kind = "),
    ],
)
def test_a_wrong_path_is_one_line_that_names_the_key(objective: dict[str, object], complaint: str) -> None:
    config = run(**objective)  # reading a config, as an actor does, imports nothing
    with pytest.raises(ConfigError) as caught:
        resolve_objective(config)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("objective.")


def test_a_file_that_is_no_python_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_objective.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="importing broken_objective raised SyntaxError"):
        resolve_objective(run(advantage={"estimator": "broken_objective:f"}))


def test_reading_a_config_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_the_learner.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = "only_the_learner:X"
    run(policy_loss={"preset": path}, advantage={"estimator": path})
    run(policy_loss={"preset": "ppo", "surrogate": {"kind": path}}, updates=2)
    assert "only_the_learner" not in sys.modules


@pytest.mark.parametrize(
    ("objective", "complaint"),
    [
        ({"advantage": {"estimator": "gpro"}}, "did you mean grpo"),
        ({"policy_loss": {"surrogate": {"kind": "pop"}}}, "did you mean ppo"),
    ],
)
def test_a_name_that_is_neither_ours_nor_a_path_is_refused_when_read(
    objective: dict[str, object], complaint: str
) -> None:
    with pytest.raises(ValidationError, match=complaint):
        run(**objective)


def test_the_automatic_preset_knows_how_many_updates_a_step_takes() -> None:
    assert resolve_objective(run()) == PRESETS["cispo"]
    for epochs, minibatches in ((2, 1), (1, 2), (2, 2)):
        assert resolve_objective(run(updates=epochs, minibatches=minibatches)) == PRESETS["decoupled"]


def test_one_s_own_preset_needs_a_trust_region_for_several_updates_too() -> None:
    objective = {"policy_loss": {"preset": f"{HERE}:SCORE"}}
    resolve_objective(run(**objective))
    with pytest.raises(ConfigError, match="needs a trust region"):
        resolve_objective(run(updates=2, **objective))


SCORE = PRESETS["cispo"]
