"""Published policy losses as values of five knobs (docs/algorithm.md, section 2).

``weight`` with ``op = "none"`` is the raw ratio rho = anchor / mu, which is 1 where the anchor is the behavior policy.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, TypeVar

from lambdapo_async.config.objective import Knob, PolicyLossConfig, RatioWeight, Rejection, Surrogate, is_dotted
from lambdapo_async.errors import ConfigError
from lambdapo_async.objective.extension import load_attribute

AUTO = "auto"

KnobT = TypeVar("KnobT", bound=Knob)


@dataclass(frozen=True, slots=True)
class PolicyLossSpec:
    """The five knobs, all set."""

    anchor: Literal["behavior", "proximal", "latest", "interpolated"]
    """The policy in the denominator of r = pi / anchor."""
    weight: RatioWeight
    """Importance weight rho = anchor / mu, without gradient."""
    reject: tuple[Rejection, ...]
    """Filters; a token must pass all of them."""
    surrogate: Surrogate
    """The differentiated term."""
    reduce: Literal["token", "sequence", "constant"]
    """What the sum is divided by."""

    @property
    def has_trust_region(self) -> bool:
        """Whether something stops a token that has moved far, once pi has left the anchor or mu.

        A clipped ratio to an anchor other than pi itself does, and so does a filter, which compares pi with mu, if it
        knows no sign or both; a truncated weight only bounds the size of an update. A surrogate of the user's own is
        trusted.
        """
        filters = any(rejection.sign != "negative" for rejection in self.reject)
        return filters or (self.surrogate.kind != "score" and self.anchor != "latest")


def resolve_policy_loss(config: PolicyLossConfig, *, num_updates: int = 1) -> PolicyLossSpec:
    """The preset, overridden field by field by the knobs that were given; without a preset, the five knobs.

    Args:
        config: what the user wrote; a dotted preset is imported.
        num_updates: optimizer updates per step, which decide what ``auto`` is.

    Raises:
        ConfigError: no such preset, a knob missing without one, or a knob that nothing applies.
    """
    if config.preset is None:
        _require_all_knobs(config)
    base = _CLIPPED if config.preset is None else _preset(config.preset, num_updates)
    spec = PolicyLossSpec(
        anchor=config.anchor or base.anchor,
        weight=_merged(base.weight, config.weight),
        reject=base.reject if config.reject is None else config.reject,
        surrogate=_merged(base.surrogate, config.surrogate),
        reduce=config.reduce or base.reduce,
    )
    _check_weight(spec, config.weight)
    _check_surrogate(spec, config.surrogate)
    return spec


def trust_region_problem(spec: PolicyLossSpec, *, num_updates: int) -> str | None:
    """What is wrong with taking ``num_updates`` updates from one batch under ``spec``; None when nothing is."""
    if num_updates == 1 or spec.has_trust_region:
        return None
    return (
        f"learner.minibatches * learner.epochs = {num_updates} takes several updates from one batch, which needs a "
        'trust region: objective.policy_loss.preset = "decoupled" or "ppo"'
    )


def _merged(base: KnobT, given: KnobT | None) -> KnobT:
    """``base`` with the fields that the user wrote, which are all that a knob dumps; they were validated when read."""
    return base if given is None else base.model_copy(update=given.model_dump())


def _require_all_knobs(config: PolicyLossConfig) -> None:
    knobs = {
        "anchor": config.anchor,
        "weight": config.weight,
        "reject": config.reject,
        "surrogate": config.surrogate,
        "reduce": config.reduce,
    }
    missing = [name for name, knob in knobs.items() if knob is None]
    if missing:
        raise ConfigError(
            f"objective.policy_loss without a preset needs all five knobs: set {', '.join(missing)}, or a preset"
        )


def _preset(name: str, num_updates: int) -> PolicyLossSpec:
    if name == AUTO:
        return _TRUNCATED_SCORE if num_updates == 1 else _DECOUPLED
    if name in PRESETS:
        return PRESETS[name]
    if is_dotted(name):
        return _own_preset(name)
    names = [AUTO, *PRESETS]
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
    raise ConfigError(
        f"objective.policy_loss.preset = {name!r} is unknown; did you mean {nearest}? Valid: {', '.join(names)}, "
        "or your own PolicyLossSpec as package.module:NAME"
    )


def _own_preset(path: str) -> PolicyLossSpec:
    spec = load_attribute(path, field="objective.policy_loss.preset")
    if not isinstance(spec, PolicyLossSpec):
        raise ConfigError(
            f"objective.policy_loss.preset = {path!r} is a {type(spec).__name__}, expected a PolicyLossSpec "
            "(lambdapo_async.objective.presets)"
        )
    return spec


def _check_weight(spec: PolicyLossSpec, given: RatioWeight | None) -> None:
    """Bounds that nothing applies, or that do not hold a weight of 1: that is what an on-policy token has."""
    weight, unused = spec.weight, RatioWeight()
    if weight.op == "none" and (weight.lo, weight.hi) != (unused.lo, unused.hi):
        raise ConfigError(
            f"objective.policy_loss.weight has bounds [{weight.lo:g}, {weight.hi:g}] but op = 'none', which ignores "
            "them: set weight.op to truncate or mask"
        )
    if weight.lo > weight.hi:
        raise ConfigError(f"objective.policy_loss.weight: lo = {weight.lo:g} exceeds hi = {weight.hi:g}")
    if not weight.lo <= 1 <= weight.hi:
        raise ConfigError(
            f"objective.policy_loss.weight: [{weight.lo:g}, {weight.hi:g}] leaves out 1, the weight of what was just "
            "sampled: widen it"
        )
    if given is not None and weight.op != "none" and spec.anchor == "behavior":
        raise ConfigError(
            "objective.policy_loss.weight cannot matter with anchor = 'behavior', where rho = 1: leave it out, or set "
            "anchor to proximal, latest or interpolated"
        )


def _check_surrogate(spec: PolicyLossSpec, given: Surrogate | None) -> None:
    """Fields that the rest of the spec makes meaningless; a surrogate of the user's own may read them all."""
    surrogate, written = spec.surrogate, set() if given is None else given.model_fields_set
    if surrogate.kind == "score" and (surrogate.dual is not None or surrogate.second_moment is not None):
        raise ConfigError(
            "objective.policy_loss.surrogate: dual and second_moment belong to kind = 'ppo', but kind is 'score', "
            'which ignores them: set surrogate.kind = "ppo" or leave them out'
        )
    if surrogate.second_moment is not None and (fixed := sorted(written & {"eps_lo", "eps_hi"})):
        raise ConfigError(
            f"objective.policy_loss.surrogate: {', '.join(fixed)} beside second_moment, which decides both eps: "
            "leave one of them out"
        )
    if surrogate.second_moment is not None and surrogate.level != "token":
        raise ConfigError(
            "objective.policy_loss.surrogate: second_moment is a mean over tokens, but level is 'geo': set one of them"
        )
    ignored = sorted(written & {"eps_lo", "eps_hi", "level", "dual", "second_moment"})
    if ignored and spec.anchor == "latest" and surrogate.kind in ("ppo", "score"):
        raise ConfigError(
            f"objective.policy_loss.surrogate: {', '.join(ignored)} cannot matter with anchor = 'latest', where r = 1: "
            "leave them out, or set anchor to behavior, proximal or interpolated"
        )


# The knobs of _CLIPPED are the defaults: without a preset, what the user left out of one is theirs.
_RAW = RatioWeight(op="none")
_TRUNCATED = RatioWeight(level="token", op="truncate", hi=2.0)
_PPO = Surrogate(kind="ppo", eps_lo=0.2, eps_hi=0.2)
_SCORE = Surrogate(kind="score")

_CLIPPED = PolicyLossSpec("behavior", _RAW, (), _PPO, "token")
_DECOUPLED = PolicyLossSpec("proximal", _TRUNCATED, (), Surrogate(kind="ppo", dual=3.0), "token")
_TRUNCATED_SCORE = PolicyLossSpec("latest", _TRUNCATED, (), _SCORE, "token")

PRESETS: Mapping[str, PolicyLossSpec] = MappingProxyType(
    {
        # PPO, arXiv:1707.06347
        "ppo": _CLIPPED,
        # Hilton et al. arXiv:2110.00641, AReaL arXiv:2505.24298, truncated importance sampling (Yao et al. 2025)
        "decoupled": _DECOUPLED,
        "tis": _DECOUPLED,
        # CISPO arXiv:2506.13585, LlamaRL arXiv:2505.24034, IMPALA arXiv:1802.01561
        "cispo": _TRUNCATED_SCORE,
        "aipo": _TRUNCATED_SCORE,
        "vtrace": _TRUNCATED_SCORE,
        # A-3PO arXiv:2512.06547: the proximal policy read off the line from mu to pi instead of computed
        "a3po": replace(_DECOUPLED, anchor="interpolated"),
        # one ratio per sequence, as in verl's rollout correction
        "seq_tis": replace(_DECOUPLED, weight=RatioWeight(level="sequence", op="truncate", hi=5.0)),
        "seq_mis": replace(_DECOUPLED, weight=RatioWeight(level="sequence", op="mask", hi=5.0)),
        # Ring-1T arXiv:2510.18855
        "icepop": replace(_DECOUPLED, weight=RatioWeight(level="token", op="mask", lo=0.5, hi=5.0), surrogate=_PPO),
        # geometric rejection, as in verl and SkyRL
        "geo_rs": replace(_DECOUPLED, reject=(Rejection(statistic="seq_geo", lo=0.99, hi=1.01),)),
        # one clipped ratio per sequence, arXiv:2507.18071
        "gspo": PolicyLossSpec(
            "behavior", _RAW, (), Surrogate(kind="ppo", level="geo", eps_lo=3e-4, eps_hi=4e-4), "sequence"
        ),
        # TOPR arXiv:2503.14286: positive rollouts unweighted, negative ones truncated at 1
        "topr": replace(_TRUNCATED_SCORE, weight=RatioWeight(level="sequence", op="truncate", hi=1.0, sign="negative")),
        # DPPO arXiv:2602.04879: a trust region on probabilities in the place of truncation
        "dppo": replace(
            _TRUNCATED_SCORE,
            weight=_RAW,
            reject=(Rejection(statistic="token_prob_diff", lo=-0.2, hi=0.2, sign="advantage"),),
        ),
        # DeepSeek-V3.2 arXiv:2512.02556, which leaves the threshold open: 0.1 nats per token
        "v32_mask": replace(_CLIPPED, reject=(Rejection(statistic="seq_geo", lo=0.905, sign="negative"),)),
        # M2PO arXiv:2510.01161: a trust region as wide as the second moment of log r allows
        "m2po": replace(_CLIPPED, surrogate=Surrogate(kind="ppo", second_moment=0.04)),
    }
)
