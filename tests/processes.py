"""Looking at processes from outside, with deadlines."""

import time
from collections.abc import Callable
from pathlib import Path

import psutil

_DEADLINE_S = 30.0


def is_gone(pid: int) -> bool:
    """Whether the process has ended; a zombie has."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Poll ``condition`` until it holds, or fail saying ``what`` did not happen."""
    deadline = time.monotonic() + _DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {_DEADLINE_S:g} s"
        time.sleep(0.02)


def read_pid(path: Path) -> int:
    """The process id that a child writes into ``path``."""
    wait_until(lambda: path.exists() and path.read_text().endswith("\n"), f"a process id in {path.name}")
    return int(path.read_text())
