"""A process that must not outlive the one that started it."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from multiprocessing.util import register_after_fork

_PR_SET_PDEATHSIG = 1


def prepare_to_die_with(parent_pid: int) -> Callable[[], None]:
    """What a child calls, between fork and exec too (``preexec_fn``), to end with the thread that started it.

    The kernel kills it (Linux; elsewhere nothing happens). Everything is looked up here: after a fork no lock is safe.

    Args:
        parent_pid: the parent as it was at the start; if it is gone by the call, the caller of it ends at once.
    """
    if sys.platform != "linux":
        return lambda: None
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def arm() -> None:
        if prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
        if os.getppid() != parent_pid:  # it died before the line above
            os.kill(os.getpid(), signal.SIGKILL)

    return arm


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the thread that started it ends; see :func:`prepare_to_die_with`."""
    prepare_to_die_with(parent_pid)()


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
