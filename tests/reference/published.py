"""Each published policy loss as its paper prints it: d objective / d log pi of every token, before the mean.

Nothing here knows of our five knobs. Arrays hold the loss tokens of a few rollouts side by side.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass
class Rollouts:
    pi: Array
    """log-probabilities, as the next two"""
    mu: Array
    old: Array
    alpha: Array
    advantage: Array
    sequence: NDArray[np.int64]

    def total(self, x: Array) -> Array:
        return np.bincount(self.sequence, x)[self.sequence]

    def mean(self, x: Array) -> Array:
        return self.total(x) / self.total(np.ones_like(x))


def exp(x: Array) -> Array:
    """exp of a log-ratio; nobody's software lets one leave +-20 nats."""
    return np.exp(np.clip(x, -20, 20))


def clipped(r: Array, a: Array, low: float = 0.8, high: float = 1.2, dual: float = np.inf) -> Array:
    """d/d log pi of min(r A, clip(r, low, high) A), for A < 0 also of max(that, dual A): r A, or 0 where constant."""
    constant = np.where(a < 0, (r < low) | (r > dual), r > high)
    return np.where(constant, 0.0, r * a)


def ppo(x: Rollouts) -> Array:
    return clipped(exp(x.pi - x.mu), x.advantage)


def decoupled(x: Rollouts) -> Array:
    return np.minimum(exp(x.old - x.mu), 2) * clipped(exp(x.pi - x.old), x.advantage, dual=3)


def a3po(x: Rollouts) -> Array:
    old = (1 - x.alpha) * x.mu + x.alpha * x.pi
    return np.minimum(exp(old - x.mu), 2) * clipped(exp(x.pi - old), x.advantage, dual=3)


def cispo(x: Rollouts) -> Array:
    return np.minimum(exp(x.pi - x.mu), 2) * x.advantage


def seq_tis(x: Rollouts) -> Array:
    return np.minimum(exp(x.total(x.old - x.mu)), 5) * clipped(exp(x.pi - x.old), x.advantage, dual=3)


def seq_mis(x: Rollouts) -> Array:
    rho = exp(x.total(x.old - x.mu))
    return np.where(rho <= 5, rho, 0) * clipped(exp(x.pi - x.old), x.advantage, dual=3)


def icepop(x: Rollouts) -> Array:
    rho = exp(x.old - x.mu)
    return np.where((rho >= 0.5) & (rho <= 5), rho, 0) * clipped(exp(x.pi - x.old), x.advantage)


def geo_rs(x: Rollouts) -> Array:
    geometric = np.exp(x.mean(x.pi - x.mu))
    return np.where((geometric >= 0.99) & (geometric <= 1.01), decoupled(x), 0)


def gspo(x: Rollouts) -> Array:
    """The mean over a rollout's tokens is inside: s = (pi(y) / mu(y))^(1/|y|), clipped in [1 - 3e-4, 1 + 4e-4]."""
    s = np.exp(x.mean(x.pi - x.mu))
    return clipped(s, x.advantage, 1 - 3e-4, 1 + 4e-4) / x.total(np.ones_like(s))


def topr(x: Rollouts) -> Array:
    return np.where(x.advantage < 0, np.minimum(exp(x.total(x.pi - x.mu)), 1), 1) * x.advantage


def dppo(x: Rollouts) -> Array:
    gap = np.exp(x.pi) - np.exp(x.mu)
    outside = ((x.advantage > 0) & (gap > 0.2)) | ((x.advantage < 0) & (gap < -0.2))
    return np.where(outside, 0, exp(x.pi - x.mu) * x.advantage)


def v32_mask(x: Rollouts) -> Array:
    return np.where((x.advantage < 0) & (x.mean(x.mu - x.pi) > -np.log(0.905)), 0, ppo(x))


def m2po(x: Rollouts) -> Array:
    """Mask the outward token with the largest (log r)^2 until the rest averages at most 0.04."""
    log_r = x.pi - x.mu
    outward = [t for t in np.argsort(-(log_r**2)) if log_r[t] * x.advantage[t] > 0]
    while outward and np.mean(log_r[outward] ** 2) > 0.04:
        log_r[outward.pop(0)] = -np.inf
    return np.where(np.isinf(log_r), 0, exp(log_r) * x.advantage)


GRADIENTS: dict[str, Callable[[Rollouts], Array]] = {
    "ppo": ppo,
    "decoupled": decoupled,
    "tis": decoupled,
    "cispo": cispo,
    "aipo": cispo,
    "vtrace": cispo,
    "a3po": a3po,
    "seq_tis": seq_tis,
    "seq_mis": seq_mis,
    "icepop": icepop,
    "geo_rs": geo_rs,
    "gspo": gspo,
    "topr": topr,
    "dppo": dppo,
    "v32_mask": v32_mask,
    "m2po": m2po,
}
