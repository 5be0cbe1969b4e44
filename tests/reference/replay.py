"""Reverb's SampleToInsertRatio and weighted sampling without replacement, as their definitions read."""

from collections.abc import Sequence
from fractions import Fraction


class SampleToInsertRatio:
    """One group per insert, ``num_samples`` per sample; exact arithmetic, absolute differences as in Reverb."""

    def __init__(self, samples_per_insert: Fraction, min_size_to_sample: int, error_buffer: Fraction) -> None:
        self.samples_per_insert, self.min_size_to_sample = samples_per_insert, min_size_to_sample
        self.min_diff = samples_per_insert * min_size_to_sample - error_buffer
        self.max_diff = samples_per_insert * min_size_to_sample + error_buffer
        self.inserts = self.samples = self.deletes = 0

    def can_sample(self, num_samples: int) -> bool:
        if self.inserts - self.deletes < self.min_size_to_sample:
            return False
        return self.inserts * self.samples_per_insert - self.samples - num_samples >= self.min_diff

    def can_insert(self) -> bool:
        if self.inserts + 1 - self.deletes <= self.min_size_to_sample:
            return True
        return (self.inserts + 1) * self.samples_per_insert - self.samples <= self.max_diff


def order_probability(weights: Sequence[Fraction], order: Sequence[int]) -> Fraction:
    """Probability that drawing by weight, one after the other and without replacement, begins with ``order``."""
    probability, left = Fraction(1), sum(weights, Fraction(0))
    for position in order:
        probability *= weights[position] / left
        left -= weights[position]
    return probability
