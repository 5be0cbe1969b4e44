"""Held-out evaluation: asked by the learner, answered by the actors, on the verifiable reward alone."""

import logging
from dataclasses import dataclass

import numpy as np

from lambdapo_async.broker.interface import RolloutSource
from lambdapo_async.config.sections import EvaluationConfig
from lambdapo_async.rollout import Lease, RolloutGroup

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """One finished evaluation."""

    step: int
    """Learner step at which it was asked."""
    reward: float
    """Mean V over the held-out prompts."""
    mean_length: float
    """Completion tokens."""
    mean_version: float
    """Mean policy version that answered; it may be newer than the one that asked."""
    groups: tuple[RolloutGroup, ...]


class Evaluation:
    """Collects the answers of each round; a round is done when every prompt is answered."""

    def __init__(self, source: RolloutSource, config: EvaluationConfig, *, num_rows: int) -> None:
        self._source, self._every = source, config.every_steps
        self._num_prompts = min(config.num_prompts, num_rows)
        self._open: dict[int, dict[int, RolloutGroup]] = {}
        self._finished: list[EvaluationResult] = []

    def is_due(self, step: int) -> bool:
        """Whether ``step`` is one of every ``every_steps``."""
        return self._every > 0 and step % self._every == 0

    def ask(self, step: int) -> None:
        """Offer the held-out prompts to the actors."""
        self._open[step] = {}
        self._source.request_evaluation([Lease("heldout", index, step) for index in range(self._num_prompts)])

    def add(self, group: RolloutGroup) -> None:
        """Take one answer; one of a round that is not open (before a restart) is only logged."""
        answers = self._open.get(group.lease.round)
        if answers is None:
            logger.info("an answer to the evaluation of step %d, which is not open", group.lease.round)
            return
        answers[group.lease.index] = group
        if len(answers) == self._num_prompts:
            del self._open[group.lease.round]
            self._finished.append(_result(group.lease.round, tuple(answers[i] for i in sorted(answers))))

    def is_open(self, step: int) -> bool:
        """Whether answers of ``step``'s round are still missing."""
        return step in self._open

    def take_finished(self) -> list[EvaluationResult]:
        """Results since the last call."""
        finished, self._finished = self._finished, []
        return finished


def _result(step: int, groups: tuple[RolloutGroup, ...]) -> EvaluationResult:
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    versions = np.concatenate([rollout.token_versions for rollout in rollouts])
    return EvaluationResult(
        step=step,
        reward=float(np.mean([rollout.reward_parts["verifiable"] for rollout in rollouts])),
        mean_length=float(np.mean([rollout.num_tokens for rollout in rollouts])),
        mean_version=float(versions.mean()) if len(versions) else 0.0,
        groups=groups,
    )
