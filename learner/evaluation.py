"""Held-out evaluation: asked by the learner, answered by the actors, on the verifiable reward alone."""

import logging
from collections.abc import Collection
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

    def __init__(
        self, source: RolloutSource, config: EvaluationConfig, *, num_rows: int, answered: Collection[int] = ()
    ) -> None:
        self._source, self._every = source, config.every_steps
        self.num_prompts = min(config.num_prompts, num_rows)
        """Held-out rows asked in each round."""
        self._asked = set(answered)
        self._open: dict[int, dict[int, RolloutGroup | None]] = {}
        self._finished: list[EvaluationResult] = []

    def is_due(self, step: int) -> bool:
        """Whether ``step`` is one of every ``every_steps``, and was not asked before a restart."""
        return self._every > 0 and step % self._every == 0 and not self.was_asked(step)

    def was_asked(self, step: int) -> bool:
        """Whether the round of ``step`` was asked, in this life or (and answered) in an earlier one."""
        return step in self._asked

    def ask(self, step: int) -> None:
        """Offer the held-out prompts to the actors."""
        self.open(step)
        self._request(step)

    def open(self, step: int) -> None:
        """Wait for the round of ``step``, which an earlier life of the learner asked; not if it was answered."""
        if step not in self._asked:
            self._asked.add(step)
            self._open[step] = {}

    def ask_again(self) -> None:
        """Offer what is not answered yet: Redis may have forgotten that it was asked."""
        for step in self._open:
            self._request(step)

    def open_rounds(self) -> tuple[int, ...]:
        """Steps whose rounds wait for answers, for a checkpoint."""
        return tuple(sorted(self._open))

    @property
    def num_missing(self) -> int:
        """Answers that the open rounds wait for."""
        return sum(self.num_prompts - len(answers) for answers in self._open.values())

    def describe_open(self) -> str:
        """The open rounds and how much of each is answered, for people."""
        num_answers = {step: len(self._open[step]) for step in self.open_rounds()}
        return ", ".join(
            f"step {step} has {number} of {self.num_prompts} answers" for step, number in num_answers.items()
        )

    def add(self, group: RolloutGroup) -> None:
        """Take one answer; one of a round that is not open (before a restart) is only logged."""
        self._settle(group.lease, group)

    def skip(self, lease: Lease) -> None:
        """The answer to ``lease`` was unreadable: its round goes on without it."""
        self._settle(lease, None)

    def _settle(self, lease: Lease, answer: RolloutGroup | None) -> None:
        answers = self._open.get(lease.round)
        if answers is None:
            logger.info("an answer to the evaluation of step %d, which is not open", lease.round)
            return
        answers[lease.index] = answer
        if len(answers) < self.num_prompts:
            return
        del self._open[lease.round]
        readable = tuple(group for _, group in sorted(answers.items()) if group is not None)
        if readable:
            self._finished.append(_result(lease.round, readable))
        else:
            logger.warning("the evaluation of step %d has no readable answer", lease.round)

    def _request(self, step: int) -> None:
        missing = [index for index in range(self.num_prompts) if index not in self._open[step]]
        self._source.request_evaluation([Lease("heldout", index, step) for index in missing])

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
