"""Child processes that never outlive us: own process groups, death signals, TERM then KILL with a deadline."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Self

from lambdapo_async.errors import LambdaPOError
from lambdapo_async.parent_death import prepare_to_die_with

_REAP_S = 5.0
_LOG_LINES_SHOWN = 15
_LOG_BYTES_READ = 64 * 1024


class ChildFailedError(LambdaPOError):
    """A process that should be running has ended; the message ends with the last lines of its log."""

    def __init__(self, name: str, returncode: int, log: Path) -> None:
        lines = "\n".join(f"  | {line}" for line in last_lines(log, _LOG_LINES_SHOWN))
        super().__init__(f"{name} ended with {_status(returncode)}; the end of {log}:\n{lines}")


class Child:
    """One supervised process and the group it leads."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name, self.log = name, log
        self._process = process
        self._returncode: int | None = None

    @property
    def pid(self) -> int:
        """The process's id, which is its group's too."""
        return self._process.pid

    @property
    def stdin(self) -> IO[bytes]:
        """The pipe to a child that was started with one."""
        if self._process.stdin is None:
            raise ValueError(f"{self.name} was started without a pipe")
        return self._process.stdin

    def poll(self) -> int | None:
        """Its exit status (negative: the signal), or None while it runs."""
        if self._returncode is None and (returncode := self._process.poll()) is not None:
            self._returncode = returncode
            self.signal(signal.SIGKILL)  # whatever it left behind in its group
        return self._returncode

    def wait(self, timeout_s: float) -> int | None:
        """As :meth:`poll`, after at most ``timeout_s``."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
        return self.poll()

    def signal(self, number: signal.Signals) -> None:
        """Signal the whole group; nothing when it is gone."""
        _signal_group(self.pid, number)

    def close(self) -> None:
        """Close the pipe to a child that was started with one."""
        if self._process.stdin is not None:
            self._process.stdin.close()

    def require_running(self) -> None:
        """``ChildFailedError`` once it has ended, however well."""
        if (returncode := self.poll()) is not None:
            raise ChildFailedError(self.name, returncode, self.log)


class Supervisor:
    """Starts children; leaving its ``with`` block, by whatever way, leaves none of them.

    Args:
        environ: of the children.
        grace_s: between TERM and KILL when it ends.
    """

    def __init__(self, environ: Mapping[str, str], *, grace_s: float = 5.0) -> None:
        self._environ, self._grace_s = dict(environ), grace_s
        self._children: list[Child] = []
        self._adopted: set[int] = set()

    def start(self, name: str, command: Sequence[str], *, log: Path, events: Path | None = None) -> Child:
        """Start ``command`` in a process group of its own.

        Args:
            name: what errors call it.
            log: takes its standard error, and its standard output where ``events`` is None.
            events: takes its standard output; such a child gets a pipe as standard input.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as log_file, (events or log).open("ab") as output_file:
            process = subprocess.Popen(
                command,
                bufsize=0,  # an order reaches the pipe at once, and closing it has nothing left to say
                stdin=subprocess.DEVNULL if events is None else subprocess.PIPE,
                stdout=output_file,
                stderr=log_file,
                env=self._environ,
                start_new_session=True,
                preexec_fn=prepare_to_die_with(os.getpid()),
            )
        child = Child(name, process, log)
        self._children.append(child)
        return child

    def adopt(self, group: int) -> None:
        """Answer for a process group that a child of ours has started, until :meth:`bury`."""
        self._adopted.add(group)

    def bury(self, group: int) -> None:
        """The leader of an adopted group has ended: kill what it left behind."""
        self._adopted.discard(group)
        _signal_group(group, signal.SIGKILL)

    def stop(self) -> None:
        """TERM to every group, KILL to what is left after the grace time, or at once on a second Ctrl-C."""
        running = [child for child in self._children if child.poll() is None]
        deadline = time.monotonic() + self._grace_s
        try:
            for child in running:
                child.signal(signal.SIGTERM)
            for child in running:
                child.wait(max(deadline - time.monotonic(), 0.0))
        finally:
            for child in running:
                if child.poll() is None:
                    child.signal(signal.SIGKILL)
                    child.wait(_REAP_S)
            for group in list(self._adopted):
                self.bury(group)
            for child in self._children:
                child.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


@contextmanager
def exit_on_termination() -> Iterator[None]:
    """Within it, SIGTERM and SIGHUP unwind the stack as Ctrl-C does, so that every clean-up runs."""

    def leave(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    previous = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def last_lines(log: Path, count: int) -> list[str]:
    """The end of a log file; empty when there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - _LOG_BYTES_READ, 0))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return [line for line in text.splitlines() if line.strip()][-count:]


def _signal_group(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _status(returncode: int) -> str:
    return signal.Signals(-returncode).name if returncode < 0 else f"exit code {returncode}"
