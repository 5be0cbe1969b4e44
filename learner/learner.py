"""The learner's loop: take a batch, train, publish, evaluate, checkpoint."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lambdapo_async.config import RunConfig
from lambdapo_async.durable import explaining_refusal
from lambdapo_async.errors import BrokerUnavailable, CheckpointError, LostDataError
from lambdapo_async.journal.journal import Journal
from lambdapo_async.weights.adapter import merged_state
from lambdapo_async.weights.hf_folder import replace_hf_folder
from lambdapo_async.weights.state import State
from learner.arrivals import Screen
from learner.batcher import Batcher
from learner.canary import LearnerCanary
from learner.checkpoint import LearnerState
from learner.evaluation import EvaluationResult
from learner.fleet_watch import FleetWatch
from learner.policy import Policy
from learner.pool import StepBatch
from learner.reporting import Reporter, Surroundings
from learner.rerun import Rerun
from learner.resync import Resync
from learner.stepper import Stepper, Trained

logger = logging.getLogger(__name__)

R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerParts:
    """Everything a learner is put together from."""

    config: RunConfig
    folder: Path
    """Of the run."""
    policy: Policy
    stepper: Stepper
    batcher: Batcher
    screen: Screen
    journal: Journal
    resync: Resync
    canary: LearnerCanary
    watch: FleetWatch
    reporter: Reporter


class Learner:
    """Trains until ``num_steps``, the evaluation target, or :meth:`stop`.

    Args:
        resumed: whether the policy comes from a checkpoint; the journal may lead beyond it.
        target_reached: whether an evaluation of an earlier life did.
    """

    def __init__(self, parts: LearnerParts, *, resumed: bool, target_reached: bool = False) -> None:
        self._parts, self._config = parts, parts.config
        self._stepper, self._batcher, self._resync = parts.stepper, parts.batcher, parts.resync
        self._evaluation, self._publisher, self._versions = (
            parts.resync.evaluation, parts.resync.publisher, parts.resync.versions
        )  # fmt: skip
        self._target_reached = target_reached
        self._stopping = threading.Event()
        self._checkpointed_step = self._stepper.step if resumed else -1

    def stop(self) -> None:
        """End after the running step, with a checkpoint; the run can be resumed."""
        self._stopping.set()

    def run(self) -> None:
        """Train.

        consumes: rollout groups    waits for: enough of them for a step    unblocks: actors, by each new version
        """
        # Before anything is published: who dies from here on can resume.
        self._checkpoint()
        try:
            is_finished = self._train()
        except (BrokerUnavailable, LostDataError) as error:
            if not self._stopping.is_set():
                raise
            is_finished = False
            logger.warning("%s; suspending without it", error)
        if not is_finished:
            self._suspend_run()
        # Not after an error: the others then learn of it when this process ends.
        self._stepper.crew.finish()

    def _train(self) -> bool:
        """Whether it came to the run's end, and not to :meth:`stop`; Redis may be away then."""
        self._redo()
        if not self._stopping.is_set():
            self._open_run()
        while not self._is_over():
            batch = self._surely(self._next_batch)
            if batch is None:
                break
            trained = self._stepper.train(batch)
            self._publish()
            self._report(trained)
            self._evaluate_if_due()
            self._checkpoint_if_due()
        return not self._stopping.is_set() and self._finish_run()

    def _is_over(self) -> bool:
        return self._stopping.is_set() or self._target_reached or self._stepper.step >= self._config.learner.num_steps

    def _surely(self, ask: Callable[[], R]) -> R:
        """What ``ask`` returns, whatever happens to Redis meanwhile."""
        return self._resync.surely(ask, consumed=lambda: self._batcher.released, stopping=self._stopping)

    def _redo(self) -> None:
        """Take the steps again that the journal holds behind the checkpoint; nobody else hears of them."""
        pool, step = self._batcher.pool, self._stepper.step
        self._open_evaluation_if_due()
        rerun = Rerun(pool, self._parts.screen, on_heldout=self._batcher.evaluate)
        for record, batch in rerun.steps(self._parts.journal.history.read(pool.taken + 1), step=step):
            trained = self._stepper.train(batch)
            self._resync.show_life()
            self._stepper.report(trained, Surroundings(), version=record.version + 1)
            self._open_evaluation_if_due()
            self._checkpoint_if_due()
            if self._stopping.is_set():
                return
        self._batcher.resume(rerun.left_over)
        if self._stepper.step > step:
            logger.info("took steps %d to %d again, from the journal", step + 1, self._stepper.step)

    def _open_run(self) -> None:
        """The first version goes out before any actor may sample."""
        self._surely(self._agree)
        self._parts.resync.ingest.start()
        self._publish()
        self._surely(self._publisher.flush)
        self._surely(self._serve_canary)
        self._resync.phase = "running"
        self._surely(self._set_phase)
        logger.info("step %d: version %d is out, the run is open", self._stepper.step, self._versions.newest)
        self._surely(self._evaluation.ask_again)

    def _agree(self) -> None:
        self._resync.publication.write()
        self._resync.initialise(consumed=self._batcher.released)

    def _set_phase(self) -> None:
        self._resync.run_store.set_phase(self._resync.phase, fence=self._resync.fence)

    def _next_batch(self) -> StepBatch | None:
        return self._batcher.next_batch(
            self._stepper.step + 1, self._versions.newest, stopping=self._stopping, while_idle=self._serve_fleet
        )

    def _publish(self) -> None:
        self._surely(self._publish_next)
        self._surely(self._serve_canary)

    def _publish_next(self) -> None:
        self._publisher.flush()  # what became of the version before must not cost a number
        self._resync.check()
        consumed = self._batcher.pool.consumed
        self._publisher.publish(self._versions.claim(), self._parts.policy, consumed=consumed)
        self._batcher.released = consumed

    def _serve_fleet(self) -> None:
        """What actors may wait for before they sample."""
        self._resync.check()
        self._serve_canary()
        self._parts.watch.tend_if_needed()

    def _serve_canary(self) -> None:
        """Score for the actors, if it is due: they may wait for it before they sample.

        Only while the policy is the version published last, so never between an update and its publication.
        """
        canary, version = self._parts.canary, self._versions.newest
        if canary.is_due(self._publisher.keyframe_version):
            self._publisher.flush()
            canary.publish(version, self._publisher.checksum(), keyframe_version=self._publisher.keyframe_version)

    def _report(self, trained: Trained) -> None:
        watch = self._parts.watch
        watch.trained(trained.batch.groups, trained.result.fresh_by_group)
        surroundings = Surroundings(
            publish_stall_s=self._publisher.take_stall_s(),
            weights=self._publisher.take_report(),
            queue=self._surely(self._resync.source.stats),
            fleet=self._surely(watch.tend),
            health=watch.metrics(),
        )
        self._stepper.report(trained, surroundings, version=self._versions.newest)

    def _open_evaluation_if_due(self) -> None:
        if self._evaluation.is_due(self._stepper.step):
            self._evaluation.open(self._stepper.step)
        self._take_evaluations()

    def _evaluate_if_due(self) -> None:
        if self._evaluation.is_due(self._stepper.step):
            self._surely(lambda: self._evaluation.ask(self._stepper.step))
        self._take_evaluations()

    def _take_evaluations(self) -> None:
        for finished in self._evaluation.take_finished():
            self._parts.reporter.evaluation(finished)
            self._target_reached = self._target_reached or self._reaches_target(finished)

    def _reaches_target(self, finished: EvaluationResult) -> bool:
        target = self._config.evaluation.target
        return target is not None and finished.reward >= target

    def _checkpoint_if_due(self) -> None:
        if self._stepper.step % self._config.learner.checkpoint_every == 0:
            self._checkpoint()

    def _checkpoint(self) -> None:
        """Make the step durable; the journal may then forget what led to it."""
        if self._stepper.step == self._checkpointed_step:
            return
        checkpoints = self._resync.checkpoints
        state = LearnerState(
            step=self._stepper.step,
            version=self._versions.newest,
            receipts=self._resync.book.state(),
            pool=self._batcher.pool.state(),
            open_rounds=self._evaluation.open_rounds(),
            journaled=self._parts.journal.next_number - 1,  # last: groups go on arriving
        )
        checkpoints.save(state, self._parts.policy)
        keep_from = checkpoints.prune(self._config.learner.keep_checkpoints)
        if not self._config.learner.record:
            self._parts.journal.prune(keep_from)
        self._checkpointed_step = self._stepper.step
        self._parts.reporter.event(self._stepper.step, "checkpoint")

    def _suspend_run(self) -> None:
        self._checkpoint()
        self._publisher.settle()
        self._parts.reporter.event(self._stepper.step, "suspended")
        logger.info("suspended at step %d; --resume goes on from here", self._stepper.step)

    def _finish_run(self) -> bool:
        """Final checkpoint and model, last version, tail evaluation; then the actors may go home. False if stopped."""
        self._checkpoint()
        self._surely(self._publisher.flush)
        final = self._parts.folder / "final"
        with explaining_refusal(final, CheckpointError):
            replace_hf_folder(final, self._final_state(), self._parts.policy.model_files)
        self._finish_evaluation()
        if self._stopping.is_set():
            return False
        self._resync.phase = "finished"
        self._surely(self._set_phase)
        self._parts.reporter.event(self._stepper.step, "finished")
        logger.info("finished at step %d, version %d", self._stepper.step, self._versions.newest)
        return True

    def _final_state(self) -> State:
        """The newest weights as one model; adapters are merged."""
        state, lora = self._publisher.newest_state(), self._config.learner.lora
        return state if lora is None else merged_state(state, lora)

    def _finish_evaluation(self) -> None:
        """Wait for every open round, unless the target was reached; say what is left out, and why."""
        step, evaluation = self._stepper.step, self._evaluation
        if not self._target_reached:
            if self._config.evaluation.every_steps > 0 and not evaluation.was_asked(step):
                self._surely(lambda: evaluation.ask(step))
            self._await_answers()
            reason = f"no answer came for learner.data_timeout_s = {self._config.learner.data_timeout_s:g} s"
        else:
            reason = "the target was reached"
        self._take_evaluations()
        if evaluation.open_rounds() and not self._stopping.is_set():
            text = f"evaluations left out because {reason}: {evaluation.describe_open()}"
            logger.warning("%s", text)
            self._parts.reporter.event(step, text)

    def _await_answers(self) -> None:
        """Nobody may be left to answer: then the run ends without, for everything else is safe."""
        evaluation, timeout_s = self._evaluation, self._config.learner.data_timeout_s
        fewest, deadline = evaluation.num_missing, time.monotonic() + timeout_s
        while evaluation.num_missing and not self._stopping.is_set():
            if evaluation.num_missing < fewest:  # data_timeout_s is of silence; answers are finitely many
                fewest, deadline = evaluation.num_missing, time.monotonic() + timeout_s
            if time.monotonic() > deadline:
                return
            self._surely(self._batcher.serve_evaluation)
            self._surely(self._resync.check)
            self._surely(self._serve_canary)
