"""The processes that a benchmark runs: each on its core, watched, ended, and with its processor time on record."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import psutil

from benchmarks.machine import ROOT

_SAMPLE_S = 0.2
_SAMPLE_TIMEOUT_S = 30.0


class Running:
    """One of our processes, with its children."""

    def __init__(self, popen: subprocess.Popen[bytes], log: Path) -> None:
        self.popen, self.log = popen, log
        self._root = psutil.Process(popen.pid)
        self._samples: list[tuple[float, float]] = []
        self._sampled = threading.Condition()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    @classmethod
    def start(cls, core: int, log: Path, *arguments: str) -> Self:
        """``python -m ...`` on one core."""
        with log.open("ab") as output:
            popen = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: os.sched_setaffinity(0, {core}),
            )
        return cls(popen, log)

    @property
    def has_ended(self) -> bool:
        """Whether it is gone, however it ended."""
        return self.popen.poll() is not None

    @property
    def has_failed(self) -> bool:
        """Whether it ended with an error."""
        return self.popen.poll() not in (None, 0)

    def stop(self) -> None:
        """SIGTERM, and SIGKILL to who does not obey."""
        self._ended.set()
        self._thread.join()
        self.popen.terminate()
        try:
            self.popen.wait(60)
        except subprocess.TimeoutExpired:
            self.popen.kill()

    def cpu_s(self, since: float, until: float) -> float:
        """Processor seconds that it and its children took between two moments (``time.time()``)."""
        return self._cpu_at(until) - self._cpu_at(since)

    def wait_sampled(self) -> None:
        """Until the processor time of this moment is on record."""
        with self._sampled:
            count = len(self._samples)
            if not self._sampled.wait_for(lambda: len(self._samples) > count + 1, _SAMPLE_TIMEOUT_S):
                sys.exit(f"{self.popen.args} cannot be sampled; its log:\n{self.log.read_text()[-3000:]}")

    def _cpu_at(self, moment: float) -> float:
        before = max((sample for sample in self._samples if sample[0] <= moment), default=self._samples[0])
        after = min((sample for sample in self._samples if sample[0] > moment), default=before)
        if after[0] == before[0]:
            return before[1]
        return before[1] + (after[1] - before[1]) * (moment - before[0]) / (after[0] - before[0])

    def _sample(self) -> None:
        while True:
            try:
                family = [self._root, *self._root.children(recursive=True)]
                seconds = sum(sum(one.cpu_times()[:2]) for one in family)
            except psutil.NoSuchProcess:  # a child that ends meanwhile; its time is missing from now on
                if not self._root.is_running():
                    return
            else:
                with self._sampled:
                    self._samples.append((time.time(), seconds))
                    self._sampled.notify_all()
            if self._ended.wait(_SAMPLE_S):
                return


@contextmanager
def process(core: int, log: Path, *arguments: str) -> Iterator[Running]:
    """One of ours, on one core, ended with the block."""
    started = Running.start(core, log, *arguments)
    try:
        yield started
    finally:
        started.stop()


def wait_for(condition: Callable[[], bool], *watched: Running, timeout_s: float = 300) -> None:
    """Exits with a log's end if one of ``watched`` fails, or nothing comes in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        late = time.monotonic() > deadline
        for one in watched:
            if one.has_failed or late:
                sys.exit(f"a process failed or hangs; its log:\n{one.log.read_text()[-3000:]}")
        time.sleep(0.05)
