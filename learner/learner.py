"""The learner's loop: take a batch, train, publish, evaluate, checkpoint."""

import logging
import threading
import time
from dataclasses import dataclass, field

from lambdapo_async.broker.interface import Fleet, QueueStats, RolloutSource, RunStore
from lambdapo_async.config import RunConfig
from lambdapo_async.errors import BrokerUnavailable
from learner.batcher import Batcher, StepBatch
from learner.canary import LearnerCanary
from learner.checkpoint import CheckpointStore, LearnerState
from learner.crew import Crew
from learner.evaluation import Evaluation, EvaluationResult
from learner.flops import utilisation
from learner.parallel import ALONE
from learner.policy import Policy
from learner.publisher import Publisher
from learner.reporting import Reporter, StepReport
from learner.trainer import StepResult, Trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerParts:
    """Everything a learner is put together from."""

    config: RunConfig
    fence: int
    policy: Policy
    trainer: Trainer
    batcher: Batcher
    evaluation: Evaluation
    publisher: Publisher
    canary: LearnerCanary
    checkpoints: CheckpointStore
    source: RolloutSource
    run_store: RunStore
    fleet: Fleet
    reporter: Reporter
    crew: Crew = field(default_factory=lambda: Crew(ALONE))
    """The other ranks."""


class Learner:
    """Trains until ``num_steps``, the evaluation target, or :meth:`stop`."""

    def __init__(self, parts: LearnerParts, *, step: int, version: int, resumed: bool) -> None:
        self._parts, self._config = parts, parts.config
        self._step = step
        self._version = version
        self._target_reached = False
        self._stopping = threading.Event()
        self._checkpointed_step = step if resumed else -1

    def stop(self) -> None:
        """End after the running step, with a checkpoint; the run can be resumed."""
        self._stopping.set()

    def run(self) -> None:
        """Train.

        consumes: rollout groups    waits for: enough of them for a step    unblocks: actors, by each new version
        """
        self._open_run()
        while not self._is_over():
            batch = self._parts.batcher.next_batch(
                self._version, stopping=self._stopping, while_idle=self._serve_canary
            )
            if batch is None:
                break
            started, flops_before = time.monotonic(), self._parts.policy.num_flops
            self._parts.crew.train([received.group for received in batch.groups], version=self._version)
            result = self._parts.trainer.step(batch.groups, version=self._version)
            self._parts.batcher.trained(batch)
            self._step += 1
            self._publish()
            queue = self._parts.source.stats()
            flops = self._parts.policy.num_flops - flops_before
            self._record(batch, result, queue, step_s=time.monotonic() - started, flops=flops)
            self._evaluate_if_due()
            self._checkpoint_if_due(queue)
        if self._stopping.is_set():
            self._suspend_run()
        else:
            self._finish_run()
        # Not after an error: the others then learn of it when this process ends.
        self._parts.crew.finish()

    def _is_over(self) -> bool:
        return self._stopping.is_set() or self._target_reached or self._step >= self._config.learner.num_steps

    def _open_run(self) -> None:
        """The first version goes out before any actor may sample, and a checkpoint before anything can be lost."""
        self._parts.publisher.publish(self._version, self._parts.policy, consumed=self._parts.batcher.consumed)
        self._parts.publisher.flush()
        self._serve_canary()
        self._parts.run_store.set_phase("running", fence=self._parts.fence)
        self._checkpoint()
        logger.info("step %d: version %d is out, the run is open", self._step, self._version)
        self._evaluate_if_due()

    def _publish(self) -> None:
        self._version += 1
        self._parts.publisher.publish(self._version, self._parts.policy, consumed=self._parts.batcher.consumed)
        self._serve_canary()

    def _serve_canary(self) -> None:
        """Score for the actors, if it is due: they may wait for it before they sample.

        Only while the policy is the version published last, so never between an update and its publication.
        """
        publisher, canary = self._parts.publisher, self._parts.canary
        if canary.is_due(publisher.keyframe_version):
            publisher.flush()
            canary.publish(self._version, publisher.checksum(), keyframe_version=publisher.keyframe_version)

    def _record(self, batch: StepBatch, result: StepResult, queue: QueueStats, *, step_s: float, flops: float) -> None:
        report = StepReport(
            step=self._step,
            version=self._version,
            batch=batch,
            result=result,
            step_s=step_s,
            mfu=utilisation(flops, step_s, self._parts.policy.device),
            publish_stall_s=self._parts.publisher.take_stall_s(),
            weights=self._parts.publisher.take_report(),
            queue=queue,
            fleet=self._parts.fleet.members(),
        )
        self._parts.reporter.step(report)

    def _evaluate_if_due(self) -> None:
        if self._parts.evaluation.is_due(self._step):
            self._parts.evaluation.ask(self._step)
        self._take_evaluations()

    def _take_evaluations(self) -> None:
        for finished in self._parts.evaluation.take_finished():
            self._parts.reporter.evaluation(finished)
            self._target_reached = self._target_reached or self._reaches_target(finished)

    def _reaches_target(self, finished: EvaluationResult) -> bool:
        target = self._config.evaluation.target
        return target is not None and finished.reward >= target

    def _checkpoint_if_due(self, queue: QueueStats) -> None:
        """Every so many steps, and before what only a checkpoint can free fills the queue."""
        limits = self._config.broker
        is_half_full = queue.num_bytes > limits.max_bytes / 2 or queue.queued > limits.max_groups / 2
        if is_half_full or self._step % self._config.learner.checkpoint_every == 0:
            self._checkpoint()

    def _checkpoint(self) -> None:
        """Make the step durable, then let Redis forget what led to it: never the other way round."""
        if self._step == self._checkpointed_step:
            return
        batcher = self._parts.batcher
        self._parts.checkpoints.save(
            LearnerState(
                step=self._step,
                version=self._version,
                consumed=batcher.durable_consumed,
                next_index=batcher.next_index,
                watermarks=batcher.watermarks(),
                totals=self._parts.reporter.totals(),
            ),
            self._parts.policy,
        )
        self._parts.source.commit(batcher.watermarks())
        self._parts.checkpoints.prune(self._config.learner.keep_checkpoints)
        self._checkpointed_step = self._step
        self._parts.reporter.event(self._step, "checkpoint")

    def _suspend_run(self) -> None:
        self._checkpoint()
        self._parts.publisher.flush()
        self._parts.reporter.event(self._step, "suspended")
        logger.info("suspended at step %d; --resume goes on from here", self._step)

    def _finish_run(self) -> None:
        """Last version, final checkpoint, tail evaluation; then the actors may go home."""
        self._parts.publisher.flush()
        self._checkpoint()
        self._finish_evaluation()
        if self._stopping.is_set():
            self._suspend_run()
            return
        self._parts.run_store.set_phase("finished", fence=self._parts.fence)
        self._parts.reporter.event(self._step, "finished")
        logger.info("finished at step %d, version %d", self._step, self._version)

    def _finish_evaluation(self) -> None:
        if self._target_reached or self._config.evaluation.every_steps == 0:
            return
        if not self._parts.evaluation.was_asked(self._step):
            self._parts.evaluation.ask(self._step)
        deadline = time.monotonic() + self._config.learner.data_timeout_s
        while self._parts.evaluation.is_open(self._step) and not self._stopping.is_set():
            if time.monotonic() > deadline:
                raise BrokerUnavailable(
                    f"the last evaluation was not answered for {self._config.learner.data_timeout_s:g} s"
                )
            self._parts.batcher.serve_evaluation()
            self._serve_canary()
        self._take_evaluations()
