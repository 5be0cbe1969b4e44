"""Sampling by freshness and advantage, without replacement."""

import math

import numpy as np
from numpy.typing import NDArray


def log_weights(
    mass_B: NDArray[np.float64], staleness_B: NDArray[np.int64], *, half_life: float
) -> NDArray[np.float64]:
    """[B] float64 ln(mass * 2 ** (-staleness / half_life)); -inf where the mass is 0.

    Args:
        mass_B: [B] sum of |advantage| over a group's rollouts.
        staleness_B: [B] versions.
        half_life: versions after which a group counts half; infinite for no decay.
    """
    log_mass = np.full(mass_B.shape, -np.inf)
    np.log(mass_B, out=log_mass, where=mass_B > 0.0)
    log_mass -= staleness_B * (math.log(2.0) / half_life)
    return log_mass


def weighted_order(log_weight_B: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.int64]:
    """[B] a random order in which each next one is drawn in proportion to its weight among those left.

    Efraimidis and Spirakis (2006): sort by -E / w, with exponential E, here in logarithms so that nothing
    underflows. What weighs nothing comes last, in the order given.
    """
    clock = np.maximum(rng.standard_exponential(log_weight_B.shape), np.finfo(np.float64).tiny)
    return np.argsort(-(log_weight_B - np.log(clock)), kind="stable")
