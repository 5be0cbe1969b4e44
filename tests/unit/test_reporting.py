"""What a step and an evaluation leave in metrics.jsonl and samples.jsonl."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lambdapo_async.broker.interface import Descriptor, QueueStats
from lambdapo_async.metrics import EVAL, EVENT, METRICS, STEP, MetricsLog, read_metrics
from lambdapo_async.rollout import Lease
from lambdapo_async.tasks.interface import Row
from learner.arrivals import ReceivedGroup
from learner.evaluation import EvaluationResult
from learner.pool import StepBatch
from learner.reporting import Reporter, StepReport, Surroundings
from learner.samples import SampleLog
from learner.tally import ArrivalTally
from learner.trainer import StepResult
from tests.groups import make_group

HELD_OUT = [Row(prompt="1+1=", answer="2"), Row(prompt="2+2=", answer="4")]


def samples_in(folder: Path) -> SampleLog:
    return SampleLog(folder / "s.jsonl", HELD_OUT, after_step=0)


def received(index: int, version: int) -> ReceivedGroup:
    group = make_group(index, rewards=(0.0, 1.0), version=version)
    if version == 5:  # its last rollout ended under the next version
        newer = make_group(index, rewards=(0.0, 1.0), version=6)
        group = replace(group, rollouts=(*group.rollouts[:-1], newer.rollouts[-1]))
    return ReceivedGroup(Descriptor("p", index + 1, group.lease, version, 10, 0.5), group, np.zeros(2), 1)


def report(step: int, **metrics: float) -> StepReport:
    groups = [received(0, 3), received(1, 5)]
    tally = ArrivalTally()
    for group in (*(r.group for r in groups), make_group(2, rewards=(1.0, 1.0))):
        tally.add(group)
    batch = StepBatch(
        groups=groups,
        version=6,
        arrived=tally.metrics(),
        totals={"trained": 2 * step, "zero_variance": step, "stale": 1, "malformed": 2, "unleased": 1},
        bias={"bias/length_ratio": 1.0},
        wait_s=0.25,
    )
    return StepReport(
        step=step,
        version=7,
        batch=batch,
        result=StepResult({"loss/policy": 0.1, "optim/grad_norm": 1.0, **metrics}, ()),
        step_s=0.5,
        surroundings=Surroundings(
            weights={"weights/bytes": 700.0},
            queue=QueueStats(
                queued=4, num_bytes=100, leased=2, returned=0, admitted=6, quarantined=0, full=7, late=8, expired=9
            ),
        ),
    )


def test_a_step_row_counts_everything_that_arrived(tmp_path: Path) -> None:
    with (
        MetricsLog(tmp_path / "m.jsonl") as metrics,
        SampleLog(tmp_path / "s.jsonl", HELD_OUT, after_step=0) as samples,
    ):
        reporter = Reporter(metrics, samples)
        reporter.step(report(1))
        reporter.step(report(2))
    first, second = read_metrics(tmp_path / "m.jsonl")
    assert (first.kind, first.step) == (STEP, 1)
    assert first.values["reward/mean"] == 4 / 6
    assert (first.values["staleness/mean"], first.values["staleness/max"]) == (2.0, 3.0)
    assert (first.values["staleness/in_flight"], first.values["staleness/waiting"]) == (0.5, 1.5)
    assert first.values["frac_reward_zero_std"] == 1 / 3
    assert (second.values["groups/trained"], second.values["groups/zero_variance"]) == (4.0, 2.0)
    assert (second.values["groups/dropped_stale"], second.values["groups/malformed"]) == (1.0, 3.0)
    assert second.values["groups/without_confidence"] == 2
    assert first.values["tokens/trained"] == 20
    assert first.values["weights/bytes"] == 700.0
    assert [first.values[f"queue/{name}"] for name in ("full", "late", "expired")] == [7, 8, 9]
    undocumented = set(first.values) - set(METRICS) - {"reward/verifiable"}
    assert not undocumented


def test_a_step_taken_again_says_nothing_of_redis(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m.jsonl") as metrics, samples_in(tmp_path) as samples:
        Reporter(metrics, samples).step(replace(report(1), surroundings=Surroundings()))
    (row,) = read_metrics(tmp_path / "m.jsonl")
    assert row.values["loss/policy"] == 0.1
    assert not [name for name in row.values if name.startswith(("queue/", "actors/", "weights/"))]


def test_a_step_without_arrivals_has_no_reward(tmp_path: Path) -> None:
    nothing = replace(report(1).batch, arrived=ArrivalTally().metrics())
    with MetricsLog(tmp_path / "m.jsonl") as metrics, samples_in(tmp_path) as samples:
        Reporter(metrics, samples).step(replace(report(1), batch=nothing))
    (row,) = read_metrics(tmp_path / "m.jsonl")
    assert np.isnan([row.values[name] for name in ("reward/mean", "rollout/length", "frac_reward_zero_std")]).all()


@pytest.mark.parametrize("mfu", [None, 0.4])
def test_mfu_is_told_where_it_is_known(tmp_path: Path, mfu: float | None) -> None:
    with MetricsLog(tmp_path / "m.jsonl") as metrics, samples_in(tmp_path) as samples:
        Reporter(metrics, samples).step(replace(report(1), mfu=mfu))
    (row,) = read_metrics(tmp_path / "m.jsonl")
    assert row.values.get("speed/mfu") == mfu


def test_an_alarm_is_an_event_when_it_begins(tmp_path: Path) -> None:
    with (
        MetricsLog(tmp_path / "m.jsonl") as metrics,
        SampleLog(tmp_path / "s.jsonl", HELD_OUT, after_step=0) as samples,
    ):
        reporter = Reporter(metrics, samples)
        for step, ess in ((1, 0.1), (2, 0.12), (3, 0.9), (4, 0.1)):
            reporter.step(report(step, **{"ratio/ess_token": ess}))
    events = [row for row in read_metrics(tmp_path / "m.jsonl") if row.kind == EVENT]
    assert [(row.step, row.text[:22]) for row in events] == [(step, "alarm: ratio/ess_token") for step in (1, 4)]


def test_an_evaluation_leaves_a_row_and_samples_to_read(tmp_path: Path) -> None:
    groups = tuple(make_group(rewards=(float(i),), lease=Lease("heldout", i, 5)) for i in range(2))
    result = EvaluationResult(step=5, reward=0.5, mean_length=5.0, mean_version=4.5, groups=groups)
    with (
        MetricsLog(tmp_path / "m.jsonl") as metrics,
        SampleLog(tmp_path / "s.jsonl", HELD_OUT, after_step=0) as samples,
    ):
        Reporter(metrics, samples).evaluation(result)
    (row,) = read_metrics(tmp_path / "m.jsonl")
    assert (row.kind, row.step, row.values["eval/reward"], row.values["eval/version"]) == (EVAL, 5, 0.5, 4.5)
    lines = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [(line["step"], line["prompt"], line["answer"], line["reward"]) for line in lines] == [
        (5, "1+1=", "2", 0.0),
        (5, "2+2=", "4", 1.0),
    ]


def test_samples_of_later_steps_are_cut_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    with SampleLog(path, HELD_OUT, after_step=0) as samples:
        for step in (5, 10):
            samples.write(step, make_group(rewards=(1.0,), lease=Lease("heldout", 0, step)))
    with SampleLog(path, HELD_OUT, after_step=5):
        pass
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [5]
