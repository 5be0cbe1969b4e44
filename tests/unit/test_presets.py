"""Presets are values; a wrong one is one line that says what to write."""

import json
from dataclasses import replace

import pytest

from lambdapo_async.config.objective import PolicyLossConfig, RatioWeight, Rejection, Surrogate
from lambdapo_async.errors import ConfigError
from lambdapo_async.objective.presets import PRESETS, PolicyLossSpec, resolve_policy_loss, trust_region_problem


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


def test_without_a_preset_a_knob_has_its_own_defaults() -> None:
    for weight, surrogate in ((RatioWeight(), Surrogate()), (RatioWeight(op="mask"), Surrogate(kind="score"))):
        config = PolicyLossConfig(
            preset=None, anchor="latest", weight=weight, reject=(), surrogate=surrogate, reduce="constant"
        )
        assert resolve_policy_loss(config) == PolicyLossSpec("latest", weight, (), surrogate, "constant")


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


def test_auto_has_a_trust_region_where_a_step_takes_several_updates() -> None:
    assert resolve_policy_loss(PolicyLossConfig()) == PRESETS["cispo"]
    assert resolve_policy_loss(PolicyLossConfig(), num_updates=2) == PRESETS["decoupled"]
    assert resolve_policy_loss(PolicyLossConfig(preset="cispo"), num_updates=2) == PRESETS["cispo"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *[(name, True) for name in ("ppo", "decoupled", "a3po", "icepop", "gspo", "dppo", "v32_mask", "m2po")],
        *[(name, False) for name in ("cispo", "topr")],
    ],
)
def test_who_has_a_trust_region(name: str, expected: bool) -> None:
    assert PRESETS[name].has_trust_region is expected
    assert trust_region_problem(PRESETS[name], num_updates=1) is None
    assert (trust_region_problem(PRESETS[name], num_updates=4) is None) is expected


def test_a_clip_around_pi_itself_is_no_trust_region() -> None:
    spec = resolve_policy_loss(PolicyLossConfig(preset="ppo", anchor="latest"))
    assert "minibatches * learner.epochs = 3" in str(trust_region_problem(spec, num_updates=3))
    assert not resolve_policy_loss(PolicyLossConfig(preset="cispo", anchor="behavior")).has_trust_region, "nor a score"


def test_a_knob_overrides_the_preset_s_field_by_field() -> None:
    cispo, decoupled = PRESETS["cispo"], PRESETS["decoupled"]
    wider = resolve_policy_loss(PolicyLossConfig(preset="cispo", weight=RatioWeight(hi=5.0)))
    assert wider == replace(cispo, weight=RatioWeight(level="token", op="truncate", lo=0.0, hi=5.0))
    higher = resolve_policy_loss(PolicyLossConfig(preset="decoupled", surrogate=Surrogate(eps_hi=0.28)))
    assert higher == replace(decoupled, surrogate=Surrogate(kind="ppo", eps_lo=0.2, eps_hi=0.28, dual=3.0))
    single = resolve_policy_loss(PolicyLossConfig(preset="decoupled", surrogate=Surrogate(dual=None)))
    assert single == replace(decoupled, surrogate=Surrogate(kind="ppo"))
    anchored = PolicyLossConfig(preset="cispo", anchor="behavior", surrogate=Surrogate(eps_lo=0.1))
    assert resolve_policy_loss(anchored).surrogate == Surrogate(kind="score", eps_lo=0.1)
    assert resolve_policy_loss(PolicyLossConfig(preset="ppo", reduce="sequence")).reduce == "sequence"


def test_what_may_be_written_though_it_changes_little() -> None:
    point = resolve_policy_loss(PolicyLossConfig(weight=RatioWeight(lo=1.0, hi=1.0)))
    assert (point.weight.lo, point.weight.hi) == (1.0, 1.0)
    assert resolve_policy_loss(PolicyLossConfig(surrogate=Surrogate(kind="score"))) == PRESETS["cispo"]
    own = Surrogate(kind="somebody.s:surrogate", eps_lo=0.1)
    assert resolve_policy_loss(PolicyLossConfig(surrogate=own)).surrogate == own, "it may read its fields as it likes"


def test_a_rejection_replaces_the_preset_s_as_a_whole() -> None:
    assert resolve_policy_loss(PolicyLossConfig(preset="geo_rs", reject=())).reject == ()
    rejection = (Rejection(statistic="seq_k3", hi=0.1),)
    assert resolve_policy_loss(PolicyLossConfig(preset="cispo", reject=rejection)).reject == rejection


@pytest.mark.parametrize(
    "config",
    [
        PolicyLossConfig(preset="decoupled", surrogate=Surrogate(eps_hi=0.28)),
        PolicyLossConfig(preset="decoupled", surrogate=Surrogate(dual=None), weight=RatioWeight(hi=5.0)),
        PolicyLossConfig(preset="v32_mask", reject=(Rejection(statistic="seq_geo", lo=0.9),)),
    ],
)
def test_what_was_overridden_survives_publishing(config: PolicyLossConfig) -> None:
    """An actor reads what the learner wrote: fields that nobody gave must not come back as given."""
    read = PolicyLossConfig.model_validate(json.loads(json.dumps(config.model_dump(mode="json"))))
    assert read == config
    assert resolve_policy_loss(read) == resolve_policy_loss(config)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (PolicyLossConfig(preset="cipso"), "'cipso' is unknown; did you mean cispo"),
        (PolicyLossConfig(preset="grpo"), "did you mean"),
        (PolicyLossConfig(preset="?"), "did you mean"),
        (PolicyLossConfig(preset=None), "set anchor, weight, reject, surrogate, reduce, or a preset"),
        (PolicyLossConfig(preset=None, anchor="latest", weight=RatioWeight(), reject=()), "set surrogate, reduce, or"),
        (PolicyLossConfig(preset="ppo", weight=RatioWeight(hi=5.0)), r"bounds \[0, 5\] but op = 'none'"),
        (PolicyLossConfig(weight=RatioWeight(op="mask", lo=3.0)), "lo = 3 exceeds hi = 2"),
        (PolicyLossConfig(preset="cispo", surrogate=Surrogate(eps_lo=0.1)), "eps_lo cannot matter with anchor = 'lat"),
        (
            PolicyLossConfig(
                preset="ppo", anchor="latest", surrogate=Surrogate(level="geo", eps_lo=0, eps_hi=1, dual=3)
            ),
            ": dual, eps_hi, eps_lo, level cannot",
        ),
        (PolicyLossConfig(preset="cispo", surrogate=Surrogate(dual=3.0)), "which ignores them"),
        (PolicyLossConfig(preset="topr", surrogate=Surrogate(second_moment=0.1)), "which ignores them"),
        (PolicyLossConfig(preset="gspo", surrogate=Surrogate(second_moment=0.1)), "level is 'geo'"),
        (PolicyLossConfig(preset="m2po", surrogate=Surrogate(eps_hi=0.1)), "eps_hi beside second_moment"),
        (PolicyLossConfig(weight=RatioWeight(op="mask", lo=1.5, hi=3.0)), r"\[1.5, 3\] leaves out 1"),
        (PolicyLossConfig(weight=RatioWeight(hi=0.5)), r"\[0, 0.5\] leaves out 1"),
        (
            PolicyLossConfig(preset="tis", anchor="behavior", weight=RatioWeight(hi=3.0)),
            "weight cannot matter with",
        ),
    ],
)
def test_errors_say_what_to_change(config: PolicyLossConfig, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        resolve_policy_loss(config)
    assert "\n" not in str(caught.value)


def test_a_filter_of_one_sign_is_no_trust_region_for_the_other() -> None:
    negative = replace(PRESETS["cispo"], reject=(Rejection(statistic="seq_geo", lo=0.9, sign="negative"),))
    assert trust_region_problem(negative, num_updates=2)
    both = replace(negative, reject=(*negative.reject, Rejection(statistic="seq_k3", hi=0.1)))
    assert trust_region_problem(both, num_updates=2) is None
