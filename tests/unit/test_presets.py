"""Presets are values; a wrong one is one line that says what to write."""

import pytest

from lambdapo_async.config.objective import PolicyLossConfig, RatioWeight, Rejection, Surrogate
from lambdapo_async.errors import ConfigError
from lambdapo_async.objective.presets import PRESETS, PolicyLossSpec, resolve_policy_loss


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_alone_is_itself(name: str) -> None:
    assert resolve_policy_loss(PolicyLossConfig(preset=name)) == PRESETS[name]


def test_a_published_preset_survives_the_knobs_written_out() -> None:
    spec = PRESETS["geo_rs"]
    config = PolicyLossConfig(
        preset=None,
        anchor=spec.anchor,
        weight=spec.weight,
        reject=spec.reject,
        surrogate=spec.surrogate,
        reduce=spec.reduce,
    )
    assert resolve_policy_loss(PolicyLossConfig.model_validate_json(config.model_dump_json())) == spec


def test_aliases() -> None:
    assert PRESETS["tis"] == PRESETS["decoupled"]
    assert PRESETS["cispo"] == PRESETS["aipo"] == PRESETS["vtrace"]


def test_every_off_policy_preset_has_a_bound() -> None:
    """Unclipped importance sampling diverges: a preset without a trust region must truncate, mask or reject."""
    for name, spec in PRESETS.items():
        assert spec.surrogate.kind == "ppo" or spec.weight.op != "none" or spec.reject, name


def test_the_default_truncates_at_two() -> None:
    spec = resolve_policy_loss(PolicyLossConfig())
    assert (spec.anchor, spec.reduce, spec.surrogate.kind) == ("latest", "token", "score")
    assert (spec.weight.op, spec.weight.level, spec.weight.lo, spec.weight.hi) == ("truncate", "token", 0.0, 2.0)


def test_gspo_is_a_mean_over_sequences_of_clipped_geometric_ratios() -> None:
    spec = PRESETS["gspo"]
    assert (spec.anchor, spec.weight.op, spec.reject, spec.reduce) == ("behavior", "none", (), "sequence")
    assert spec.surrogate == Surrogate(kind="ppo", level="geo", eps_lo=3e-4, eps_hi=4e-4)


def test_a_knob_replaces_the_preset_s() -> None:
    base = PRESETS["decoupled"]
    weight = RatioWeight(op="truncate", hi=5.0)
    assert resolve_policy_loss(PolicyLossConfig(preset="decoupled", weight=weight)) == PolicyLossSpec(
        base.anchor, weight, base.reject, base.surrogate, base.reduce
    )
    assert resolve_policy_loss(PolicyLossConfig(preset="geo_rs", reject=())).reject == ()
    rejection = (Rejection(statistic="seq_k3", hi=0.1),)
    assert resolve_policy_loss(PolicyLossConfig(preset="cispo", reject=rejection)).reject == rejection
    changed = resolve_policy_loss(
        PolicyLossConfig(preset="ppo", anchor="proximal", surrogate=Surrogate(eps_hi=0.28), reduce="constant")
    )
    assert (changed.anchor, changed.surrogate.eps_hi, changed.reduce) == ("proximal", 0.28, "constant")


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (PolicyLossConfig(preset="cipso"), "'cipso' is unknown; did you mean cispo"),
        (PolicyLossConfig(preset="grpo"), "did you mean"),
        (PolicyLossConfig(preset=None), "set anchor, weight, reject, surrogate, reduce, or a preset"),
        (PolicyLossConfig(preset=None, anchor="latest", weight=RatioWeight(), reject=()), "set surrogate, reduce, or"),
        (PolicyLossConfig(weight=RatioWeight(hi=5.0)), r"bounds \[0, 5\] but op = 'none'"),
        (PolicyLossConfig(weight=RatioWeight(op="mask", lo=3.0)), "lo = 3 exceeds hi = 2"),
    ],
)
def test_errors_say_what_to_change(config: PolicyLossConfig, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        resolve_policy_loss(config)
    assert "\n" not in str(caught.value)
