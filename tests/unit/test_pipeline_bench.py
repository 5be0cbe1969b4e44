"""What benchmarks/pipeline.py says of processor time and of the slower side must be that."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.pipeline import Rates, processor_speed, shares, speed
from benchmarks.processes import Running

BURNS_IN_A_CHILD = """
import multiprocessing, os, sys, time
def burn():
    while sum(os.times()[:2]) < 0.5: pass
    print("burnt", flush=True)
    time.sleep(60)
if __name__ == "__main__":
    sys.stdin.readline()
    multiprocessing.get_context("fork").Process(target=burn, daemon=True).start()
    time.sleep(60)
"""


def test_processor_time_counts_children_and_only_the_asked_time(tmp_path: Path) -> None:
    script = tmp_path / "burns.py"
    script.write_text(BURNS_IN_A_CHILD)
    popen = subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    running = Running(popen, tmp_path / "log")
    try:
        assert popen.stdin is not None
        assert popen.stdout is not None
        running.wait_sampled()
        started = time.time()
        popen.stdin.close()
        assert popen.stdout.readline() == b"burnt\n"
        running.wait_sampled()
        burnt = time.time()
        running.wait_sampled()
        assert 0.3 <= running.cpu_s(started, burnt) <= 2.0
        assert running.cpu_s(burnt, time.time()) < 0.2
    finally:
        running.stop()
        assert popen.stdout is not None
        popen.stdout.close()


def test_the_pipeline_is_held_against_the_slower_side_of_its_own_moment() -> None:
    results = {
        "actor alone": [Rates(200.0, 0.0, actor_cpu_ms=5.0), Rates(100.0, 0.0, actor_cpu_ms=5.0)],
        "learner alone": [Rates(300.0, 0.0, learner_cpu_ms=3.0)],
        "pipeline": [Rates(120.0, 0.0, actor_cpu_ms=6.25, learner_cpu_ms=3.0)],
    }
    assert list(shares(results, speed)) == pytest.approx([120.0 / 150.0])
    assert list(shares(results, processor_speed)) == pytest.approx([5.0 / 6.25])
