"""The anchor: which policy a ratio is taken against, and where between two versions it lies."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lambdapo_async.objective.anchor import anchor_of, version_alpha
from lambdapo_async.objective.presets import PRESETS


def test_the_anchors() -> None:
    logprobs_T = torch.tensor([-1.0], requires_grad=True)
    behavior_T, proximal_T = torch.tensor([-2.0]), torch.tensor([-3.0])

    def anchor(name: str, proximal: Tensor | None, alpha: float = 0.0) -> Tensor:
        spec = replace(PRESETS["ppo"], anchor=name)
        return anchor_of(spec, logprobs_T, behavior_T, proximal, torch.tensor([alpha]))

    assert anchor("behavior", proximal_T).item() == -2.0
    assert anchor("latest", proximal_T).item() == -1.0
    assert anchor("proximal", proximal_T).item() == -3.0
    # In the first update of a step the proximal policy is the newest one.
    assert anchor("proximal", None).item() == -1.0
    assert [anchor("interpolated", None, alpha).item() for alpha in (0.0, 0.25, 1.0)] == [-2.0, -1.75, -1.0]
    assert not any(anchor(name, None).requires_grad for name in ("latest", "proximal", "interpolated"))


def test_alpha_is_where_the_step_began_on_the_line_of_versions() -> None:
    versions_T = torch.tensor([7, 6, 4, -1])
    halfway = version_alpha(versions_T, version=7, progress=0.5)
    assert halfway.tolist() == pytest.approx([0.0, 1 / 1.5, 3 / 3.5, 8 / 8.5])
    first = version_alpha(versions_T, version=7, progress=0.0)
    assert (first.tolist(), first.dtype) == ([1.0] * 4, torch.float32)


def test_tokens_newer_than_a_resumed_step_count_as_its_own() -> None:
    assert version_alpha(torch.tensor([7, 8, 9]), version=7, progress=0.5).tolist() == [0.0] * 3


def test_the_line_meets_the_proximal_policy_where_log_pi_is_linear_in_the_version() -> None:
    """mu at version 4, the step begins at 7, pi is half a version further: the anchor is log pi at version 7."""
    slope, spec = -0.3, replace(PRESETS["ppo"], anchor="interpolated")
    at = lambda version: torch.tensor([-1.0 + slope * version])  # noqa: E731
    alpha_T = version_alpha(torch.tensor([4]), version=7, progress=0.5)
    torch.testing.assert_close(anchor_of(spec, at(7.5), at(4), None, alpha_T), at(7))
