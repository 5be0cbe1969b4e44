"""The policy loss one token at a time, in Python floats, as docs/algorithm.md (section 2) writes it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lambdapo_async.config.objective import Rejection
from lambdapo_async.objective.policy_loss import LossDenominator
from lambdapo_async.objective.presets import PolicyLossSpec


@dataclass
class Columns:
    """One entry per token; sequences are numbered by ``segments``."""

    behavior: Sequence[float]
    anchor: Sequence[float]
    advantages: Sequence[float]
    mask: Sequence[bool]
    segments: Sequence[int]

    def of_sequence(self, segment: int) -> list[int]:
        return [t for t, keep in enumerate(self.mask) if keep and self.segments[t] == segment]


def clamp(x: float, lo: float, hi: float) -> float:
    return min(max(x, lo), hi)


def ratio(top: Sequence[float], bottom: Sequence[float], columns: Columns, t: int, level: str) -> float:
    tokens = [t] if level == "token" else columns.of_sequence(columns.segments[t])
    log_ratio = sum(top[u] - bottom[u] for u in tokens)
    if level == "geo":
        log_ratio /= len(tokens)
    return math.exp(clamp(log_ratio, -20.0, 20.0))


def weight_of(columns: Columns, t: int, spec: PolicyLossSpec) -> float:
    if spec.weight.sign == "negative" and columns.advantages[t] >= 0:
        return 1.0
    rho = ratio(columns.anchor, columns.behavior, columns, t, spec.weight.level)
    if spec.weight.op == "none":
        return rho
    if spec.weight.op == "truncate":
        return clamp(rho, spec.weight.lo, spec.weight.hi)
    return rho if spec.weight.lo <= rho <= spec.weight.hi else 0.0


def is_rejected(now: Sequence[float], columns: Columns, t: int, rejection: Rejection) -> bool:
    mu = columns.behavior
    tokens = [t] if rejection.statistic.startswith("token") else columns.of_sequence(columns.segments[t])
    moved = sum(now[u] - mu[u] for u in tokens)
    statistic = {
        "token_ratio": lambda: ratio(now, mu, columns, t, "token"),
        "token_prob_diff": lambda: math.exp(now[t]) - math.exp(mu[t]),
        "seq_ratio": lambda: ratio(now, mu, columns, t, "sequence"),
        "seq_geo": lambda: ratio(now, mu, columns, t, "geo"),
        "seq_k3": lambda: sum(ratio(now, mu, columns, u, "token") - 1 - (now[u] - mu[u]) for u in tokens) / len(tokens),
    }[rejection.statistic]()
    if rejection.lo <= statistic <= rejection.hi:
        return False
    if rejection.sign == "negative":
        return columns.advantages[t] < 0
    if rejection.sign == "advantage":
        return columns.advantages[t] * moved > 0
    return True


def objective(logprobs: Sequence[float], now: Sequence[float], columns: Columns, t: int, spec: PolicyLossSpec) -> float:
    """``logprobs`` is differentiated, ``now`` holds the same values as constants."""
    surrogate, advantage = spec.surrogate, columns.advantages[t]
    lo, hi = 1 - surrogate.eps_lo, 1 + surrogate.eps_hi
    if surrogate.kind == "score":
        return clamp(ratio(now, columns.anchor, columns, t, surrogate.level), lo, hi) * advantage * logprobs[t]
    r = ratio(logprobs, columns.anchor, columns, t, surrogate.level)
    clipped = min(r * advantage, clamp(r, lo, hi) * advantage)
    if surrogate.dual is not None and advantage < 0:
        clipped = max(clipped, surrogate.dual * advantage)
    return clipped


def loss(
    logprobs: Sequence[float],
    now: Sequence[float],
    columns: Columns,
    spec: PolicyLossSpec,
    denominator: LossDenominator,
) -> float:
    total = 0.0
    for t, keep in enumerate(columns.mask):
        if not keep or any(is_rejected(now, columns, t, rejection) for rejection in spec.reject):
            continue
        token = -weight_of(columns, t, spec) * objective(logprobs, now, columns, t, spec)
        if spec.reduce == "token":
            total += token / denominator.num_loss_tokens
        elif spec.reduce == "sequence":
            total += token / len(columns.of_sequence(columns.segments[t])) / denominator.num_sequences
        else:
            total += token / (denominator.num_sequences * denominator.max_tokens)
    return total


def gradient(
    now: Sequence[float], columns: Columns, spec: PolicyLossSpec, denominator: LossDenominator, *, step: float = 1e-6
) -> list[float]:
    """d loss / d log pi of every token by central differences; constants stay where they are."""
    slopes = []
    for t in range(len(now)):
        up = [value + step * (u == t) for u, value in enumerate(now)]
        down = [value - step * (u == t) for u, value in enumerate(now)]
        rise = loss(up, now, columns, spec, denominator) - loss(down, now, columns, spec, denominator)
        slopes.append(rise / (2 * step))
    return slopes
