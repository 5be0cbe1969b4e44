"""A process that must not outlive the one that started it."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing.util import register_after_fork

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the thread that started it ends (Linux; elsewhere nothing happens).

    Args:
        parent_pid: the parent as it was at the start; if it is gone already, this process exits at once.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:  # it died before the line above
        os.kill(os.getpid(), signal.SIGKILL)


def end_only_with_parent(parent_pid: int) -> None:
    """As :func:`die_with_parent`, in a process group of its own: Ctrl-C in a terminal is the parent's to act on."""
    die_with_parent(parent_pid)
    os.setpgid(0, 0)


@contextlib.contextmanager
def forked_children_end_with_us() -> Iterator[None]:
    """Processes that ``multiprocessing`` forks from this thread in the block end with it, and only with it."""
    tether = _Tether()
    register_after_fork(tether, lambda tether: end_only_with_parent(tether.pid))
    yield
    del tether  # the registry holds it weakly


class _Tether:
    """Remembers who forked."""

    def __init__(self) -> None:
        self.pid = os.getpid()
