"""Slow advantages of one group, close to the notation of docs/algorithm.md, section 1."""

import math
from collections.abc import Sequence


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def sign(x: float) -> int:
    return (x > 0) - (x < 0)


def pair_weight(weight: str, reward_gap: float, confidence_gap: float) -> float:
    if weight == "own":
        return 2 * sigmoid(confidence_gap)
    if weight == "rank":
        return 2 * sigmoid(-sign(reward_gap) * confidence_gap)
    if weight == "agree":
        return 2 * sigmoid(sign(reward_gap) * confidence_gap)
    assert weight == "uniform"
    return 1.0


def lambda_advantages(rewards: Sequence[float], confidence: Sequence[float], *, weight: str, tau: float) -> list[float]:
    size = len(rewards)
    advantages = []
    for i in range(size):
        total = 0.0
        for j in range(size):
            if j != i:
                gap = rewards[i] - rewards[j]
                total += pair_weight(weight, gap, (confidence[i] - confidence[j]) / tau) * gap
        advantages.append(total / (size - 1))
    return advantages


def standard_deviation(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
