"""One step: train, count, tell; the same whether its batch was just chosen, is in the journal, or on record."""

import time
from dataclasses import dataclass

from learner.crew import Crew
from learner.flops import utilisation
from learner.policy import Policy
from learner.pool import StepBatch
from learner.reporting import Reporter, StepReport, Surroundings
from learner.trainer import StepResult, Trainer


@dataclass(frozen=True, slots=True)
class Trained:
    """A step that was taken."""

    batch: StepBatch
    result: StepResult
    num_flops: float
    started: float
    """On the monotonic clock, in seconds."""


class Stepper:
    """Takes steps on all ranks.

    Args:
        step: steps that the policy has taken.
    """

    def __init__(self, policy: Policy, trainer: Trainer, crew: Crew, reporter: Reporter, *, step: int) -> None:
        self._policy, self._trainer, self._reporter = policy, trainer, reporter
        self.crew = crew
        """The other ranks."""
        self.step = step
        """Steps taken."""

    def train(self, batch: StepBatch) -> Trained:
        """Take the next step on ``batch``."""
        started, flops_before = time.monotonic(), self._policy.num_flops
        self.crew.train([received.group for received in batch.groups], version=batch.version)
        result = self._trainer.step(batch.groups, version=batch.version)
        self.step += 1
        return Trained(batch, result, self._policy.num_flops - flops_before, started)

    def report(self, trained: Trained, surroundings: Surroundings, *, version: int) -> None:
        """Tell of the newest step, which made ``version``."""
        step_s = time.monotonic() - trained.started
        self._reporter.step(
            StepReport(
                step=self.step,
                version=version,
                batch=trained.batch,
                result=trained.result,
                step_s=step_s,
                mfu=utilisation(trained.num_flops, step_s, self._policy.device),
                surroundings=surroundings,
            )
        )
