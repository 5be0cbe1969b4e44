"""The tests' end of ``python -m actors.nursery``."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Self

Event = dict[str, Any]


class Nursery:
    """A running nursery; every wait has a deadline."""

    def __init__(self, command: Sequence[str] = (sys.executable, "-m", "actors.nursery"), *, timeout_s: float = 60.0):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self._buffer = b""
        self._seen: list[Event] = []
        try:
            self.expect("ready", timeout_s=timeout_s)
        except (EOFError, TimeoutError):
            self.close()
            raise

    def start_actor(self, args: Sequence[str], log: Path) -> int:
        """Pid of a new actor, ``args`` being what would follow ``python -m actors``."""
        self.send(json.dumps({"args": list(args), "log": str(log)}))
        return int(self.expect("started")["pid"])

    def wait_exit(self, pid: int, *, timeout_s: float = 60.0) -> int:
        """Return code of the actor ``pid``, negative if a signal ended it."""
        return int(self.expect("exited", pid=pid, timeout_s=timeout_s)["returncode"])

    def send(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")

    def expect(self, event: str, *, pid: int | None = None, timeout_s: float = 60.0) -> Event:
        """The oldest unconsumed event of that name (and pid), waiting for it if need be."""
        deadline = time.monotonic() + timeout_s
        while True:
            for seen in self._seen:
                if seen["event"] == event and pid in (None, seen.get("pid")):
                    self._seen.remove(seen)
                    return seen
            self._read(deadline, wanted=event)

    def _read(self, deadline: float, *, wanted: str) -> None:
        assert self.process.stdout is not None
        if not wait([self.process.stdout.fileno()], max(0.0, deadline - time.monotonic())):
            raise TimeoutError(f"no event {wanted!r} from the nursery; unconsumed: {self._seen}")
        read = os.read(self.process.stdout.fileno(), 65536)
        if not read:
            raise EOFError(f"the nursery ended before event {wanted!r}; unconsumed: {self._seen}")
        *lines, self._buffer = (self._buffer + read).split(b"\n")
        self._seen += [json.loads(line) for line in lines]

    def close(self, *, timeout_s: float = 30.0) -> int:
        """End the nursery and its actors; its return code."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            return self.process.wait(timeout_s)
        finally:
            self.process.kill()
            self.process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
