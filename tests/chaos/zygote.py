"""Processes that are there in 0.1 s: forked from one that has imported torch, transformers, learner and actors."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess

from tests.chaos.spec import ProcessSpec

PRELOADED = ("tests.chaos.preloaded",)
Body = Callable[[ProcessSpec, int], None]


class Forked:
    """One process under faults; -9 is its return code after a kill."""

    def __init__(self, body: Body, spec: ProcessSpec) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        self.spec = spec
        self.was_killed = False
        self._process: BaseProcess = context.Process(target=_run, args=(body, spec), name=spec.who)
        self._process.start()

    @property
    def who(self) -> str:
        return self.spec.who

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def sentinel(self) -> int:
        return self._process.sentinel

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._process.exitcode

    def send(self, number: signal.Signals) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        self.was_killed = True
        self.send(signal.SIGKILL)
        self.wait(10.0)

    def wait(self, timeout_s: float) -> int | None:
        """Return code; None if it still runs after ``timeout_s``."""
        self._process.join(timeout_s)
        return self.returncode

    def last_line(self) -> str:
        """Of its log."""
        lines = self.spec.log.read_text(errors="replace").splitlines() if self.spec.log.exists() else []
        return lines[-1] if lines else ""


def _run(body: Body, spec: ProcessSpec) -> None:
    body(spec, os.getppid())
