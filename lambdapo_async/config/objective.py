"""The objective's sections: how rewards become advantages and advantages a gradient."""

import difflib
import math
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    PositiveFloat,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from lambdapo_async.config.sections import Section

ESTIMATORS = ("lambda", "rloo", "grpo", "dr_grpo", "reinforce_pp")
SURROGATES = ("ppo", "score")

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*[.:][A-Za-z_]\w*")


def is_dotted(name: str) -> bool:
    """Whether ``name`` means something of the user's: ``package.module:NAME`` or ``package.module.NAME``."""
    return _DOTTED.fullmatch(name) is not None


def _one_of(names: tuple[str, ...]) -> Callable[[str], str]:
    def check(name: str) -> str:
        if name in names or is_dotted(name):
            return name
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise ValueError(f"did you mean {nearest}? Valid: {', '.join(names)}, or your own as package.module:name")

    return check


class Knob(Section):
    """A section whose fields override a preset's one by one; what was not given is not written either."""

    @model_serializer(mode="wrap")
    def _as_given(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Read back, a knob must override what it overrode before, and nothing else."""
        return {name: value for name, value in serialize(self).items() if name in self.model_fields_set}


class AdvantageConfig(Section):
    """The advantage estimator (docs/algorithm.md, section 1)."""

    estimator: Annotated[str, AfterValidator(_one_of(ESTIMATORS))] = "lambda"
    """``lambda`` (pairwise decomposed), ``rloo``, ``grpo``, ``dr_grpo``, ``reinforce_pp``, or the dotted path of a
    function; only the learner imports it."""
    weight: Literal["own", "rank", "agree", "uniform"] = "own"
    """Pair weight w_ij of ``lambda``."""
    tau: PositiveFloat = 1.0
    """Temperature of the pair weight, in units of the confidence."""
    confidence: Literal["z", "mean", "sum"] = "z"
    """s_i: mean token log-probability standardised in the group, the mean, or the sum."""
    confidence_policy: Literal["behavior", "proximal"] = "behavior"
    """Whose log-probabilities: the recorded ones, or the learner's at the step's start (one more forward pass)."""
    center: bool = False
    """Subtract the group's mean advantage."""
    shift: float = 0.0
    """Constant added to every advantage of a group that has reward variance."""
    std_norm: bool = False
    """Divide by the standard deviation of the group's rewards."""


class RatioWeight(Knob):
    """Importance weight rho = pi_anchor / mu, detached."""

    level: Literal["token", "sequence", "geo"] = "token"
    """One ratio per token, the sequence's product, or its geometric mean."""
    op: Literal["none", "truncate", "mask"] = "none"
    """``truncate`` clamps rho into [lo, hi]; ``mask`` sets it to 0 outside."""
    lo: float = Field(0.0, ge=0.0)
    """Lower bound of rho."""
    hi: PositiveFloat = 2.0
    """Upper bound of rho."""
    sign: Literal["any", "negative"] = "any"
    """``negative``: only rollouts with a negative advantage are weighted."""


ON_POLICY = {"token_ratio": 1.0, "token_prob_diff": 0.0, "seq_ratio": 1.0, "seq_geo": 1.0, "seq_k3": 0.0}
"""What each statistic is where pi = mu."""


class Rejection(Section):
    """Tokens or sequences outside [lo, hi] of a statistic get no gradient."""

    statistic: Literal["token_ratio", "token_prob_diff", "seq_ratio", "seq_geo", "seq_k3"]
    """What is compared with the bounds, per token or per sequence."""
    lo: float = Field(float("-inf"), allow_inf_nan=True)
    """Lower bound, in the statistic's unit."""
    hi: float = Field(float("inf"), allow_inf_nan=True)
    """Upper bound, in the statistic's unit."""
    sign: Literal["any", "advantage", "negative"] = "any"
    """``advantage``: only where the ratio moved with the advantage's sign; ``negative``: only A < 0."""

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if self.lo == -math.inf and self.hi == math.inf:
            raise ValueError("a filter without bounds rejects nothing: set lo or hi, or leave it out")
        if not self.lo <= ON_POLICY[self.statistic] <= self.hi:
            raise ValueError(
                f"[{self.lo:g}, {self.hi:g}] leaves out {ON_POLICY[self.statistic]:g}, which is {self.statistic} where "
                "pi = mu, so what was just sampled would be rejected: widen it"
            )
        return self


class Surrogate(Knob):
    """The differentiated term, with r = pi / anchor."""

    kind: Annotated[str, AfterValidator(_one_of(SURROGATES))] = "ppo"
    """``ppo``: clipped ratio; ``score``: sg(clipped ratio) * A * log pi; or the dotted path of a function."""
    level: Literal["token", "geo"] = "token"
    """r per token, or the sequence's geometric mean (GSPO)."""
    eps_lo: float = Field(0.2, ge=0.0)
    """r is clipped below 1 - eps_lo."""
    eps_hi: float = Field(0.2, ge=0.0)
    """r is clipped above 1 + eps_hi."""
    dual: float | None = Field(None, gt=1.0)
    """Dual clip: bound of r for A < 0; None is off."""
    second_moment: PositiveFloat | None = None
    """Budget of the mean (log r)^2, from which both eps are solved before every update (M2PO); None is off."""


class PolicyLossConfig(Section):
    """The policy loss: a preset, or the five knobs (docs/algorithm.md, section 2)."""

    preset: str | None = "auto"
    """A published variant, the dotted path of a PolicyLossSpec, or ``auto``: ``cispo``, and ``decoupled`` where a step
    takes several updates. What a knob gives replaces the preset's, field by field."""
    anchor: Literal["behavior", "proximal", "latest", "interpolated"] | None = None
    """The policy in the denominator of r."""
    weight: RatioWeight | None = None
    """Importance weight of the anchor against the behavior policy."""
    reject: tuple[Rejection, ...] | None = None
    """Filters; a token must pass all of them. Replaces the preset's as a whole."""
    surrogate: Surrogate | None = None
    """The differentiated term."""
    reduce: Literal["token", "sequence", "constant"] | None = None
    """Denominator: tokens of the step, mean per sequence, or tokens at full length."""


class KlConfig(Section):
    """Penalty for leaving the model that the run began with."""

    coefficient: float = Field(0.0, ge=0.0)
    """Weight in the loss; above 0 a frozen copy of the first model is kept."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Per-token estimate of KL(pi || reference)."""


class ObjectiveConfig(Section):
    """What the learner maximises."""

    advantage: AdvantageConfig = AdvantageConfig()
    """How rewards become advantages."""
    policy_loss: PolicyLossConfig = PolicyLossConfig()
    """How advantages become a gradient."""
    kl: KlConfig = KlConfig()
    """Penalty for leaving the first model."""
    entropy_coefficient: float = Field(0.0, ge=0.0)
    """Weight of the entropy bonus in the loss."""
