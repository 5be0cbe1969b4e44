"""The demo as a user runs it: it reaches its target past a killed actor, and Ctrl-C leaves nothing behind."""

import re
import signal
from pathlib import Path

import psutil
import pytest

from lambdapo_async.metrics import EVENT
from tests.processes import Process, wait_until
from tests.system.test_run import DEMO, RUN_S, START_S, last_step, rows

pytestmark = [pytest.mark.system, pytest.mark.engine, pytest.mark.timeout(1000)]


def demo(output_dir: Path, run_id: str, log: Path, *overrides: str) -> Process:
    settings = [f"output_dir={output_dir}", *overrides]
    flags = [part for setting in settings for part in ("--set", setting)]
    return Process("lambdapo_async.cli.app", "demo", "--config", str(DEMO), "--run-id", run_id, *flags, log=log)


def family(process: Process) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def test_a_demo_reaches_its_target_and_leaves_a_report(output_dir: Path, tmp_path: Path) -> None:
    process = demo(output_dir, "demo", tmp_path / "log", "evaluation.target=0.75", "evaluation.every_steps=3")
    try:
        wait_until(lambda: last_step(output_dir / "demo") >= 1, "the first step", timeout_s=START_S, alive=process)
        started = family(process)
        assert process.wait(timeout_s=RUN_S) == 0, process.log_tail()
    finally:
        process.kill()
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not alive
    report = (output_dir / "demo" / "report.html").read_text()
    assert "<svg" in report or "data:image" in report
    assert not re.search(r'(src|href)="https?:', report), "the report loads something from elsewhere"
    assert any("killed" in row.text for row in rows(output_dir / "demo", EVENT))


@pytest.mark.parametrize("when", ["starting", "training"])
def test_ctrl_c_leaves_no_process_behind(output_dir: Path, tmp_path: Path, when: str) -> None:
    process = demo(output_dir, f"interrupted-{when}", tmp_path / "log")
    folder = output_dir / f"interrupted-{when}"
    try:
        wait_until(lambda: len(family(process)) >= 3, "the processes start", timeout_s=START_S, alive=process)
        if when == "training":
            wait_until(lambda: last_step(folder) >= 2, "two steps", timeout_s=START_S, alive=process)
        started = family(process)
        process.send(signal.SIGINT)
        assert process.wait(timeout_s=60.0) == 130, process.log_tail()
    finally:
        process.kill()
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not alive, alive
