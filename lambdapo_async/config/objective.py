"""The objective's sections: how rewards become advantages and advantages a gradient."""

from typing import Literal

from pydantic import Field, PositiveFloat

from lambdapo_async.config.sections import Section


class AdvantageConfig(Section):
    """The advantage estimator (docs/algorithm.md, section 1)."""

    estimator: Literal["lambda", "rloo", "grpo", "dr_grpo", "reinforce_pp"] = "lambda"
    """``lambda``: pairwise decomposed advantage."""
    weight: Literal["own", "rank", "agree", "uniform"] = "own"
    """Pair weight w_ij of ``lambda``."""
    tau: PositiveFloat = 1.0
    """Temperature of the pair weight, in units of the confidence."""
    confidence: Literal["z", "mean", "sum"] = "z"
    """s_i: mean token log-probability standardised in the group, the mean, or the sum."""
    center: bool = False
    """Subtract the group's mean advantage."""
    shift: float = 0.0
    """Constant added to every advantage of a group that has reward variance."""
    std_norm: bool = False
    """Divide by the standard deviation of the group's rewards."""


class RatioWeight(Section):
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


class Rejection(Section):
    """Tokens or sequences outside [lo, hi] of a statistic get no gradient."""

    statistic: Literal["token_ratio", "token_prob_diff", "seq_ratio", "seq_geo", "seq_k3"]
    """What is compared with the bounds, per token or per sequence."""
    lo: float = float("-inf")
    """Lower bound, in the statistic's unit."""
    hi: float = float("inf")
    """Upper bound, in the statistic's unit."""
    sign: Literal["any", "advantage", "negative"] = "any"
    """``advantage``: only where the ratio moved with the advantage's sign; ``negative``: only A < 0."""


class Surrogate(Section):
    """The differentiated term, with r = pi / anchor."""

    kind: Literal["ppo", "score"] = "ppo"
    """``ppo``: clipped ratio; ``score``: sg(weight) * A * log pi."""
    level: Literal["token", "geo"] = "token"
    """r per token, or the sequence's geometric mean (GSPO)."""
    eps_lo: float = Field(0.2, ge=0.0)
    """r is clipped below 1 - eps_lo."""
    eps_hi: float = Field(0.2, ge=0.0)
    """r is clipped above 1 + eps_hi."""
    dual: PositiveFloat | None = None
    """Dual clip: bound of r for A < 0; None is off."""


class PolicyLossConfig(Section):
    """The policy loss: a preset, or the five knobs (docs/algorithm.md, section 2)."""

    preset: str | None = "cispo"
    """Name of a published variant; a knob given beside it replaces the preset's."""
    anchor: Literal["behavior", "proximal", "latest"] | None = None
    """The policy in the denominator of r."""
    weight: RatioWeight | None = None
    """Importance weight of the anchor against the behavior policy."""
    reject: tuple[Rejection, ...] | None = None
    """Filters; a token must pass all of them."""
    surrogate: Surrogate | None = None
    """The differentiated term."""
    reduce: Literal["token", "sequence", "constant"] | None = None
    """Denominator: tokens of the step, mean per sequence, or tokens at full length."""


class ObjectiveConfig(Section):
    """What the learner maximises."""

    advantage: AdvantageConfig = AdvantageConfig()
    """How rewards become advantages."""
    policy_loss: PolicyLossConfig = PolicyLossConfig()
    """How advantages become a gradient."""
