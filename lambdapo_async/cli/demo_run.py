"""The demo itself: bring a run up, watch it, kill an actor half-way, see it through."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lambdapo_async.broker.heartbeat import Heartbeat
from lambdapo_async.cli.actor_pool import ActorPool, kill_one, require_healthy
from lambdapo_async.cli.progress import Progress
from lambdapo_async.cli.progress_view import ProgressView
from lambdapo_async.cli.supervise import Child, ChildFailedError, last_lines
from lambdapo_async.errors import LambdaPOError
from lambdapo_async.metrics import EVENT, MetricsLog, MetricsTail
from lambdapo_async.report.summary import KILLED

_POLL_S = 0.25
_BRING_UP_S = 600.0
"""From the start to the first step: a GPU's engine takes minutes, and the starter model may have to be built."""
_PHASE_WIDTH = 100


class DemoTimeoutError(LambdaPOError):
    """The run did not come up before the deadline."""


class RunWatch(Protocol):
    """What the broker tells a bystander."""

    def is_published(self) -> bool:
        """Whether actors can join."""

    def fleet(self) -> Sequence[Heartbeat]:
        """The actors that live."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoParts:
    """Everything that a demo is put together from."""

    metrics: Path
    """metrics.jsonl of the run; the learner writes it."""
    num_actors: int
    learner: Child
    pool: ActorPool
    watch: RunWatch
    view: ProgressView
    finish_s: float = 20.0
    """After the learner's end, for the actors to go home."""


class DemoRun:
    """Sees one run through; whoever made the parts stops the processes."""

    def __init__(self, parts: DemoParts, progress: Progress) -> None:
        self._parts, self._progress = parts, progress
        self._rows = MetricsTail(parts.metrics)
        self._killed = False

    def run(self) -> None:
        """Return when the learner has finished well.

        Raises:
            ChildFailedError: a process ended that should not have, with the end of its log.
            DemoTimeoutError: there was no first step before the deadline.
        """
        self._bring_up()
        while not self._learner_is_done():
            self._observe()
            if self._progress.is_half_way and not self._killed:
                self._replace_an_actor()
        self._observe()
        self._parts.pool.finish(self._parts.finish_s)

    def _bring_up(self) -> None:
        """Everything starts at once; actors follow as soon as there is a run to join."""
        self._parts.view.say("starting the learner and what the actors need, in parallel")
        while not self._parts.watch.is_published():
            if self._learner_is_done():
                raise ChildFailedError(self._parts.learner.name, 0, self._parts.learner.log)
            self._observe()
        for _ in range(self._parts.num_actors):
            self._parts.pool.start()
        self._parts.view.say(f"the run is in Redis; {self._parts.num_actors} actors join")

    def _learner_is_done(self) -> bool:
        """Wait a moment for the learner's end; ``ChildFailedError`` when it is a bad one."""
        learner = self._parts.learner
        if (returncode := learner.wait(_POLL_S)) is None:
            return False
        if returncode != 0:
            raise ChildFailedError(learner.name, returncode, learner.log)
        return True

    def _observe(self) -> None:
        for row in self._rows.take():
            self._progress.add(row)
        if self._progress.step == 0:
            self._wait_for_first_step()
        self._progress.observe(self._parts.watch.fleet())
        require_healthy(self._parts.pool)
        self._parts.view.show(self._progress)

    def _wait_for_first_step(self) -> None:
        if self._progress.elapsed_s > _BRING_UP_S:
            logs = self._parts.learner.log.parent
            raise DemoTimeoutError(f"no optimizer step within {_BRING_UP_S:.0f} s; look into the logs in {logs}")
        for line in last_lines(self._parts.learner.log, 1):
            self._progress.phase = f"learner: {(line.partition(': ')[2] or line)[:_PHASE_WIDTH]}"

    def _replace_an_actor(self) -> None:
        victim = kill_one(self._parts.pool)
        if victim is None:
            return
        replacement = self._parts.pool.start()
        self._killed = True
        text = f"{KILLED} {victim.name} (pid {victim.pid}) with SIGKILL; {replacement.name} takes its place"
        with MetricsLog(self._parts.metrics) as log:
            log.write(EVENT, self._progress.step, {"text": text})
        self._parts.view.say(f"half-way at held-out reward {self._progress.heldout:.3f}: {text}")
