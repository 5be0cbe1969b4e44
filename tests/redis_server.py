"""A Redis that tests may kill, freeze, roll back and restart, always at the same URL."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import redis

from lambdapo_async.broker.connection import connect, redis_executable
from lambdapo_async.parent_death import prepare_to_die_with

READY_S = 20.0
AOF = ("appendonly yes", "appendfsync everysec", 'save ""')
RDB = ("appendonly no", 'save ""', "dbfilename dump.rdb")


class ServerRefusedError(Exception):
    """This server does not know a setting."""


class RedisServer:
    """One server process after the other on one folder and one socket."""

    def __init__(self, folder: Path, socket: Path, settings: Sequence[str], password: str | None) -> None:
        self.url = f"unix://:{password}@{socket}" if password else f"unix://{socket}"
        self.data = folder
        self._socket, self._settings = socket, settings
        self._process: subprocess.Popen[bytes] | None = None
        self.client = connect(self.url, timeout_s=READY_S)

    def start(self) -> None:
        self.data.mkdir(parents=True, exist_ok=True)
        self._socket.unlink(missing_ok=True)
        settings = ("port 0", f"unixsocket {self._socket}", f"dir {self.data}", "daemonize no", *self._settings)
        self._process = subprocess.Popen(
            [redis_executable(), "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            preexec_fn=prepare_to_die_with(os.getpid()),
        )
        assert self._process.stdin is not None
        with self._process.stdin as stdin:
            stdin.write("\n".join(settings).encode())
        deadline = time.monotonic() + READY_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise ServerRefusedError(f"the server did not start: {self._process.returncode}")
            time.sleep(0.01)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait(READY_S)

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def restart(self) -> None:
        """kill -9, then again with what is on the disk."""
        self.kill()
        self.start()

    def restart_empty(self) -> None:
        self.kill()
        shutil.rmtree(self.data)
        self.start()

    @contextlib.contextmanager
    def rolled_back(self) -> Iterator[None]:
        """Everything written inside is lost, as by a power cut: the append-only file ends where it ended before."""
        log = self._log()
        size = log.stat().st_size
        yield
        self.kill()
        os.truncate(log, size)
        self.start()

    def close(self) -> None:
        self.client.close()
        if self._process is not None and self._process.poll() is None:
            self.thaw()
            self.kill()

    def _log(self) -> Path:
        """The append-only file; Redis 7 keeps it in pieces."""
        return max(self.data.rglob("*.aof"), key=lambda path: (path.name.endswith(".incr.aof"), path.stat().st_mtime))

    def _answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except (redis.ConnectionError, redis.TimeoutError):
            return False


@contextlib.contextmanager
def own_server(folder: Path, settings: Sequence[str] = AOF, *, password: str | None = None) -> Iterator[RedisServer]:
    """A running server, gone afterwards; its socket lies in a short path of its own."""
    with tempfile.TemporaryDirectory(prefix="lp-test-") as socket_folder:
        server = RedisServer(folder / "data", Path(socket_folder) / "s", settings, password)
        try:
            server.start()
            yield server
        finally:
            server.close()
