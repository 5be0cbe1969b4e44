"""Real processes under test: started as a user starts them, watched from outside with deadlines, never left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from lambdapo_async.cli.supervise import last_lines

ROOT = Path(__file__).parents[1]
_POLL_S = 0.02
_LOG_LINES_SHOWN = 40


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
                # A test run in the background of a shell ignores Ctrl-C, and so would its children.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
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
            raise AssertionError(f"still running after {timeout_s:g} s\n{self.log_tail()}") from error

    def kill(self) -> None:
        """kill -9 of the process and whatever it started in its session."""
        if self.is_running():
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)

    def log_tail(self) -> str:
        return "\n".join(last_lines(self._log, _LOG_LINES_SHOWN))


def wait_until(
    condition: Callable[[], bool], what: str, *, timeout_s: float = 30.0, alive: Process | None = None
) -> None:
    """Poll ``condition`` until it holds; fails, saying ``what`` did not happen, in time or before ``alive`` ended."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if alive is not None and not alive.is_running():
            raise AssertionError(f"{what}: the process ended with {alive.returncode}\n{alive.log_tail()}")
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {timeout_s:g} s\n{alive.log_tail() if alive else ''}")
        time.sleep(_POLL_S)


def is_gone(pid: int) -> bool:
    """Whether the process has ended; a zombie has."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def read_pid(path: Path) -> int:
    """The process id that a child writes into ``path``."""
    wait_until(lambda: path.exists() and path.read_text().endswith("\n"), f"a process id in {path.name}")
    return int(path.read_text())
