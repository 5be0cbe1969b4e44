"""What a run tells about itself: metrics.jsonl, samples.jsonl and the log."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from lambdapo_async.broker.heartbeat import Heartbeat
from lambdapo_async.broker.interface import QueueStats
from lambdapo_async.objective.alarms import Alarms
from lambdapo_async.rollout import RolloutGroup
from learner.evaluation import EvaluationResult
from learner.pool import StepBatch
from learner.trainer import StepResult

logger = logging.getLogger(__name__)

_SAMPLES_PER_EVALUATION = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What else went on when a step ended; nothing when it was taken again, from the journal."""

    publish_stall_s: float = 0.0
    weights: Mapping[str, float] = field(default_factory=dict)
    """``weights/*`` of the last publication that has ended; empty if it was reported already."""
    queue: QueueStats | None = None
    fleet: Sequence[Heartbeat] = ()
    health: Mapping[str, float] = field(default_factory=dict)
    """``actors/*`` of what their groups say of them."""

    def metrics(self) -> dict[str, float]:
        """By name."""
        if self.queue is None:
            return {}
        return {
            **self.weights,
            **_depths(self.queue),
            **_fleet(self.fleet),
            **self.health,
            "time/publish_stall_s": self.publish_stall_s,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """Everything that is known when a step has ended."""

    step: int
    version: int
    """The version that the step made."""
    batch: StepBatch
    result: StepResult
    step_s: float
    mfu: float | None = None
    """Share of the peak that the first rank's device reached; None where no peak is known."""
    surroundings: Surroundings


class MetricSink(Protocol):
    """Where rows go: a file in production, a list in tests."""

    def write(self, kind: str, step: int, values: Mapping[str, float | str]) -> None:
        """Append one row."""


class SampleSink(Protocol):
    """Where sample rollouts go."""

    def write(self, step: int, group: RolloutGroup) -> None:
        """Append one group's first rollout."""


class Reporter:
    """Turns steps and evaluations into rows with stable names (lambdapo_async/metrics.py lists them)."""

    def __init__(self, metrics: MetricSink, samples: SampleSink) -> None:
        self._metrics, self._samples = metrics, samples
        self._alarms = Alarms()
        self._step_ended = time.monotonic()

    def step(self, report: StepReport) -> None:
        """One finished optimizer step."""
        now = time.monotonic()
        total_s, self._step_ended = now - self._step_ended, now
        row = {
            "policy_version": float(report.version),
            **report.batch.arrived,
            **report.result.metrics,
            **_staleness(report.batch),
            **_counts(report.batch),
            **report.batch.bias,
            **_speed(report.batch, total_s),
            **({} if report.mfu is None else {"speed/mfu": report.mfu}),
            **report.surroundings.metrics(),
            "time/step_s": report.step_s,
            "time/wait_s": report.batch.wait_s,
            "speed/idle_share": min(report.batch.wait_s / max(total_s, 1e-9), 1.0),
        }
        alarms = self._alarms.check(row)
        self._metrics.write("step", report.step, {**row, **alarms.metrics})
        logger.info(
            "step=%d reward=%.3f loss=%.4f grad_norm=%.3f staleness=%.1f wait=%.2fs train=%.2fs",
            report.step, row["reward/mean"], row["loss/policy"], row["optim/grad_norm"], row["staleness/mean"],
            report.batch.wait_s, report.step_s,
        )  # fmt: skip
        for sentence in alarms.raised:
            logger.warning("step=%d alarm: %s", report.step, sentence)
            self.event(report.step, f"alarm: {sentence}")

    def evaluation(self, result: EvaluationResult) -> None:
        """One finished held-out evaluation."""
        self._metrics.write(
            "eval",
            result.step,
            {
                "eval/reward": result.reward,
                "eval/num": float(len(result.groups)),
                "eval/length": result.mean_length,
                "eval/version": result.mean_version,
            },
        )
        logger.info("evaluation of step %d: held-out reward %.3f", result.step, result.reward)
        for group in result.groups[:_SAMPLES_PER_EVALUATION]:
            self._samples.write(result.step, group)

    def event(self, step: int, text: str) -> None:
        """Something worth a mark on the curves."""
        self._metrics.write("event", step, {"text": text})


def _counts(batch: StepBatch) -> dict[str, float]:
    totals = batch.totals
    return {
        "groups/trained": totals.get("trained", 0),
        "groups/zero_variance": totals.get("zero_variance", 0),
        "groups/dropped_stale": totals.get("stale", 0),
        "groups/evicted": totals.get("evicted", 0),
        "groups/too_large": totals.get("too_large", 0),
        "groups/duplicate": totals.get("duplicate", 0),
        "groups/quarantined": totals.get("quarantined", 0),
        "groups/malformed": totals.get("malformed", 0) + totals.get("unleased", 0),
        "groups/without_confidence": sum(received.num_missing_confidence for received in batch.groups),
    }


def _staleness(batch: StepBatch) -> dict[str, float]:
    staleness = batch.staleness()
    newest = np.array([received.group.max_version for received in batch.groups])
    return {
        "staleness/mean": float(staleness.mean()),
        "staleness/max": float(staleness.max()),
        "staleness/waiting": float((batch.version - newest).mean()),
        "staleness/in_flight": float((newest - batch.version + staleness).mean()),
    }


def _speed(batch: StepBatch, total_s: float) -> dict[str, float]:
    tokens = sum(received.group.num_completion_tokens for received in batch.groups)
    sequences = sum(len(received.group.rollouts) for received in batch.groups)
    return {
        "tokens/trained": tokens,
        "speed/tokens_per_s": tokens / total_s,
        "speed/sequences_per_s": sequences / total_s,
    }


def _depths(queue: QueueStats) -> dict[str, float]:
    return {
        "queue/groups": queue.queued,
        "queue/bytes": queue.num_bytes,
        "queue/leased": queue.leased,
        "queue/admitted": queue.admitted,
        "queue/full": queue.full,
        "queue/late": queue.late,
        "queue/expired": queue.expired,
    }


def _fleet(fleet: Sequence[Heartbeat]) -> dict[str, float]:
    return {
        "actors/alive": len(fleet),
        "actors/tokens_per_s": sum(actor.tokens_per_s for actor in fleet),
        "actors/idle_share": float(np.mean([actor.idle_share for actor in fleet])) if fleet else 1.0,
    }
