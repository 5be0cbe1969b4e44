"""A Redis server that is killed, frozen, rolled back and emptied, and always comes back at the same address."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import redis

from lambdapo_async.broker.connection import _version, connect, redis_executable
from lambdapo_async.parent_death import prepare_to_die_with

_READY_S, _POLL_S = 10.0, 0.005
_MAX_MEMORY = 512 * 1024**2
_COMMON = (
    "bind 127.0.0.1",
    "unixsocketperm 700",
    "repl-diskless-sync yes",
    "repl-diskless-sync-delay 0",
    f"maxmemory {_MAX_MEMORY}",
    "maxmemory-policy noeviction",
    "daemonize no",
)
# Its histograms of every command weigh 1.2 MB, many times what a run under faults keeps there.
_SINCE_7 = ("latency-tracking no",)
PERSISTENCE = {
    "none": ('save ""', "appendonly no"),
    "everysec": ('save ""', "appendonly yes", "appendfsync everysec"),
    "always": ('save ""', "appendonly yes", "appendfsync always"),
    "rdb": ('save ""', "appendonly no"),
}
"""Settings by name; with ``rdb`` it is told when to write a snapshot."""


class RedisControl:
    """One server with its data in ``folder``, reached through a unix socket there."""

    def __init__(self, folder: Path, persistence: str) -> None:
        """``folder``: its path must be short, for a socket's has 107 bytes at most."""
        self._folder, self._persistence = folder, persistence
        folder.mkdir(parents=True, exist_ok=True)
        self.socket = folder / "s"
        self._port = free_port()
        self.url = f"unix://{self.socket}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it and wait until it has read its data."""
        assert self._process is None
        self.socket.unlink(missing_ok=True)
        lines = (*_COMMON, *PERSISTENCE[self._persistence], f"port {self._port}", f"unixsocket {self.socket}")
        executable = redis_executable()
        lines = (*lines, f'dir "{self._folder}"', *(_SINCE_7 if _version(executable) >= (7, 0) else ()))
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(
                [executable, "-"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=prepare_to_die_with(os.getpid()),
            )
        assert self._process.stdin is not None
        with self._process.stdin as stdin:
            stdin.write("\n".join(lines).encode())
        self._wait_until_ready()

    def kill(self) -> None:
        """kill -9."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(10)
        self._process = None

    def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        if self._process is not None:
            self.kill()

    def client(self, *, timeout_s: float = 10.0) -> redis.Redis:
        return connect(self.url, timeout_s=timeout_s)

    def save_snapshot(self) -> None:
        """What an ``rdb`` server goes back to when it is killed."""
        client = self.client()
        client.save()
        client.close()

    def limit_memory(self, beyond: int) -> None:
        """Refuse whatever would let it hold ``beyond`` more bytes than now (negative: anything that needs memory)."""
        with contextlib.closing(self.client()) as client:
            client.config_set("maxmemory", client.info("memory")["used_memory"] + beyond)

    def lift_limit(self) -> None:
        """As much as in the beginning."""
        with contextlib.closing(self.client()) as client:
            client.config_set("maxmemory", _MAX_MEMORY)

    def evict(self, source: random.Random) -> str:
        """One key goes, whichever: its name."""
        with contextlib.closing(self.client()) as client:
            names = sorted(client.keys())
            name: bytes = source.choice(names) if names else b""
            client.delete(name)
        return name.decode(errors="replace")

    def cut_log(self, source: random.Random, *, most_bytes: int) -> int:
        """Power loss: of the append-only file, the last 0 to ``most_bytes`` bytes never reached the disk."""
        path = self._append_only_file()
        size = path.stat().st_size
        cut = source.randrange(0, min(size, most_bytes) + 1)
        os.truncate(path, size - cut)
        return cut

    def empty(self) -> None:
        """Nothing is left of its data."""
        assert self._process is None
        for path in self._folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "redis.log":
                path.unlink()

    def follow(self, primary: "RedisControl") -> None:
        """Become a replica of ``primary``; returns once it has all of its data."""
        with contextlib.closing(self.client()) as client:
            client.replicaof("127.0.0.1", primary._port)
            deadline = time.monotonic() + _READY_S
            while client.info("replication").get("master_link_status") != "up":
                assert time.monotonic() < deadline, "the replica did not catch up"
                time.sleep(_POLL_S)

    def promote(self) -> None:
        """Stop being a replica."""
        with contextlib.closing(self.client()) as client:
            client.replicaof("NO", "ONE")

    def _append_only_file(self) -> Path:
        """Redis 6.2 has one, 7 a folder of them whose newest increment is written to."""
        increments = sorted(
            self._folder.glob("appendonlydir/*.incr.aof"), key=lambda path: int(path.name.split(".")[-3])
        )
        return increments[-1] if increments else self._folder / "appendonly.aof"

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + _READY_S
        client = self.client(timeout_s=1.0)
        try:
            while True:
                try:
                    client.ping()
                except (redis.ConnectionError, redis.TimeoutError):
                    if self._process.poll() is not None or time.monotonic() > deadline:
                        log = (self._folder / "redis.log").read_text(errors="replace")[-2000:]
                        raise AssertionError(f"redis-server did not come up: {log}") from None
                    time.sleep(_POLL_S)
                else:
                    return
        finally:
            client.close()


def held_bytes(client: redis.Redis) -> int | None:
    """What a server really holds, whatever scripts of ours count; its clients and its own upkeep are not in it.

    None while it rewrites its log: for what comes meanwhile Redis 6.2 takes 10 MiB at once, and counts those it used.
    """
    memory = client.info()
    if memory["aof_rewrite_in_progress"]:
        return None
    # Its used_memory_dataset is the same, but wraps around below 0: it counts its clients now and then only.
    held: int = memory["used_memory"] - memory["used_memory_overhead"]
    return held


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
