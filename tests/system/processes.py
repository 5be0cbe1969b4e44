"""Real processes under test: started as a user starts them, watched with deadlines, never left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lambdapo_async.metrics import STEP, MetricRow, read_metrics

ROOT = Path(__file__).parents[2]
_POLL_S = 0.05


def wait_until(condition: Callable[[], bool], *, timeout_s: float, what: str, alive: "Process | None" = None) -> None:
    """Poll ``condition`` until it holds; fails loudly after ``timeout_s`` or when ``alive`` died."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if alive is not None and not alive.is_running():
            raise AssertionError(f"{what}: the process ended with {alive.returncode}\n{alive.log_tail()}")
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {timeout_s} s\n{alive.log_tail() if alive else ''}")
        time.sleep(_POLL_S)


class Process:
    """One process in its own session, with its output in a file."""

    def __init__(self, *arguments: str, log: Path) -> None:
        self._log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.poll()

    def is_running(self) -> bool:
        return self._process.poll() is None

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, *, timeout_s: float) -> int:
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"still running after {timeout_s} s\n{self.log_tail()}") from error

    def kill(self) -> None:
        """kill -9 of the process and whatever it started in its session."""
        if self.is_running():
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])


@contextmanager
def learner(config: Path, *arguments: str, log: Path) -> Iterator[Process]:
    process = Process("learner", str(config), *arguments, log=log)
    try:
        yield process
    finally:
        process.kill()


def rows(folder: Path, kind: str) -> list[MetricRow]:
    """Rows of one kind in a run's metrics.jsonl; none before the file exists."""
    path = folder / "metrics.jsonl"
    return [row for row in read_metrics(path) if row.kind == kind] if path.exists() else []


def last_step(folder: Path) -> int:
    return max((row.step for row in rows(folder, STEP)), default=0)
