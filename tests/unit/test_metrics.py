import json
import math
import os
from pathlib import Path

import pytest

from lambdapo_async.errors import DiskError
from lambdapo_async.metrics import (
    EVAL,
    EVENT,
    METRICS,
    STEP,
    JsonLinesTail,
    MetricsLog,
    MetricsTail,
    read_metrics,
    series,
    truncate_after,
)
from lambdapo_async.report.curves import CHARTS, REWARD_CHART
from tests.full_disk import full_disk


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "metrics.jsonl"


def test_rows_come_back_as_written(path):
    with MetricsLog(path) as log:
        log.write(STEP, 1, {"reward/mean": 0.25, "groups/trained": 16})
        log.write(EVENT, 1, {"text": "checkpoint"})
    step, event = read_metrics(path)
    assert (step.kind, step.step, dict(step.values)) == (STEP, 1, {"reward/mean": 0.25, "groups/trained": 16.0})
    assert (event.kind, event.text, dict(event.values)) == (EVENT, "checkpoint", {})
    assert 0 <= event.time - step.time < 60


def test_a_full_disk_is_named_and_costs_no_line_that_is_there(path: Path) -> None:
    with MetricsLog(path) as log:
        for step in (1, 2):
            log.write(STEP, step, {"reward/mean": 0.25})
        with full_disk(), pytest.raises(DiskError, match=r"metrics\.jsonl cannot be written: .*large; free disk space"):
            log.write(STEP, 3, {"reward/mean": 0.5})
        size = path.stat().st_size
        with full_disk(size + 20), pytest.raises(DiskError, match=r"metrics\.jsonl cannot be written: .*large"):
            log.write(STEP, 3, {"reward/mean": 0.5})
        assert path.stat().st_size == size + 20
    with full_disk(), pytest.raises(DiskError, match=r"metrics\.jsonl cannot be written: .*large; free disk space"):
        MetricsLog(path, after_step=1)
    assert [row.step for row in read_metrics(path)] == [1, 2]
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_numbers_without_a_json_form_are_null_in_the_file_and_nan_in_a_row(path):
    with MetricsLog(path) as log:
        log.write(STEP, 1, {"optim/grad_norm": math.inf, "loss/policy": math.nan, "reward/mean": 1.0})
    assert json.loads(path.read_text())["optim/grad_norm"] is None
    (row,) = read_metrics(path)
    assert math.isnan(row.values["optim/grad_norm"])
    assert [value for name in row.values for _, value in series([row], STEP, name)] == [1.0]


def test_each_row_is_on_disk_before_the_log_is_closed(path):
    log = MetricsLog(path)
    log.write(STEP, 1, {})
    assert len(read_metrics(path)) == 1
    log.close()
    log.close()


def test_a_resumed_log_cuts_later_steps_and_the_torn_line_and_goes_on(path):
    with MetricsLog(path) as log:
        for step in (1, 2, 3):
            log.write(STEP, step, {"reward/mean": step})
    with path.open("ab") as file:
        file.write(b'{"step": 2, "time": 1.0, "kin')
    with MetricsLog(path, after_step=2) as log:
        log.write(STEP, 3, {"reward/mean": 30})
    assert [(row.step, row.values["reward/mean"]) for row in read_metrics(path)] == [(1, 1), (2, 2), (3, 30)]


def test_a_line_torn_at_its_newline_is_not_glued_to_the_next(path):
    with MetricsLog(path) as log:
        log.write(STEP, 1, {})
    with path.open("ab") as file:
        file.write(path.read_bytes().rstrip(b"\n"))
    with MetricsLog(path, after_step=1) as log:
        log.write(STEP, 2, {})
    assert [row.step for row in read_metrics(path)] == [1, 2]


def test_a_second_writer_leaves_the_history_alone(path):
    with MetricsLog(path, after_step=0) as learner, MetricsLog(path) as bystander:
        learner.write(STEP, 5, {})
        bystander.write(EVENT, 5, {"text": "killed"})
        learner.write(STEP, 6, {})
    assert [row.kind for row in read_metrics(path)] == [STEP, EVENT, STEP]


def test_truncating_keeps_the_file_when_there_is_nothing_to_cut(path):
    with MetricsLog(path) as log:
        log.write(STEP, 1, {})
    before = path.stat().st_ino
    truncate_after(path, 1)
    assert path.stat().st_ino == before
    truncate_after(path, 0)
    assert path.read_bytes() == b""


def test_two_learners_that_truncate_at_once_do_not_trip_over_each_other(path, monkeypatch):
    """One of them was replaced while it started; it finds that out later."""
    with MetricsLog(path) as log:
        for step in (1, 2):
            log.write(STEP, step, {})
    replace, calls = os.replace, []

    def replace_after_the_other(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 1:
            truncate_after(path, 1)
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_after_the_other)
    truncate_after(path, 1)
    assert len(calls) == 2
    assert [row.step for row in read_metrics(path)] == [1]
    assert list(path.parent.iterdir()) == [path]


def test_a_tail_returns_complete_lines_once(path):
    tail = MetricsTail(path)
    assert tail.take() == []
    with MetricsLog(path) as log:
        log.write(STEP, 1, {})
        assert [row.step for row in tail.take()] == [1]
        assert tail.take() == []
        with path.open("ab") as file:
            file.write(b'{"step": 2, "time": 2.5, ')
        assert tail.take() == []
        with path.open("ab") as file:
            file.write(b'"kind": "eval", "eval/reward": 0.5}\n')
        (row,) = tail.take()
    assert (row.kind, row.step, row.time, row.values["eval/reward"]) == (EVAL, 2, 2.5, 0.5)


@pytest.mark.parametrize("line", [b"garbage", b"[1]", b'{"kind": "step"}', b'{"step": "x", "time": 1, "kind": "step"}'])
def test_a_line_that_is_no_row_is_skipped(path, line):
    path.parent.mkdir()
    path.write_bytes(line + b'\n{"step": 1, "time": 1, "kind": "step"}\n')
    assert [row.step for row in read_metrics(path)] == [1]


def test_json_lines_of_any_shape_can_be_tailed(path):
    path.parent.mkdir()
    path.write_bytes(b'{"event": "ready"}\nnoise\n{"event": "started", "pid": 7}\n')
    assert [event["event"] for event in JsonLinesTail(path).take()] == ["ready", "started"]


def test_every_plotted_metric_is_documented():
    plotted = {line.name for chart in (REWARD_CHART, *CHARTS) for line in chart.lines}
    assert plotted <= METRICS.keys()
