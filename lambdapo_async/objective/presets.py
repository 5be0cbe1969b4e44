"""Published policy losses as values of five knobs (docs/algorithm.md, section 2).

``weight`` with ``op = "none"`` is the raw ratio rho = anchor / mu, which is 1 where the anchor is the behavior policy.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from lambdapo_async.config.objective import PolicyLossConfig, RatioWeight, Rejection, Surrogate
from lambdapo_async.errors import ConfigError


@dataclass(frozen=True, slots=True)
class PolicyLossSpec:
    """The five knobs, all set."""

    anchor: Literal["behavior", "proximal", "latest"]
    """The policy in the denominator of r = pi / anchor."""
    weight: RatioWeight
    """Importance weight rho = anchor / mu, without gradient."""
    reject: tuple[Rejection, ...]
    """Filters; a token must pass all of them."""
    surrogate: Surrogate
    """The differentiated term."""
    reduce: Literal["token", "sequence", "constant"]
    """What the sum is divided by."""


def resolve_policy_loss(config: PolicyLossConfig) -> PolicyLossSpec:
    """The preset with the given knobs put in its place, or the five knobs.

    Raises:
        ConfigError: no such preset, a knob missing without one, or bounds of a weight that nothing applies.
    """
    if config.preset is None:
        _require_all_knobs(config)
    base = _CLIPPED if config.preset is None else _preset(config.preset)
    spec = PolicyLossSpec(
        anchor=config.anchor or base.anchor,
        weight=config.weight or base.weight,
        reject=base.reject if config.reject is None else config.reject,
        surrogate=config.surrogate or base.surrogate,
        reduce=config.reduce or base.reduce,
    )
    _check_weight(spec.weight)
    return spec


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


def _preset(name: str) -> PolicyLossSpec:
    if name in PRESETS:
        return PRESETS[name]
    nearest = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
    raise ConfigError(
        f"objective.policy_loss.preset = {name!r} is unknown; did you mean {nearest}? Valid: {', '.join(PRESETS)}"
    )


def _check_weight(weight: RatioWeight) -> None:
    """A weight is replaced whole, so ``weight.hi = 5`` alone would silently turn truncation off."""
    unused = RatioWeight()
    if weight.op == "none" and (weight.lo, weight.hi) != (unused.lo, unused.hi):
        raise ConfigError(
            f"objective.policy_loss.weight has bounds [{weight.lo:g}, {weight.hi:g}] but op = 'none', which ignores "
            "them: set weight.op to truncate or mask"
        )
    if weight.lo > weight.hi:
        raise ConfigError(f"objective.policy_loss.weight: lo = {weight.lo:g} exceeds hi = {weight.hi:g}")


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
    }
)
