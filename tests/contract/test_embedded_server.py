"""The Redis that a run starts for itself."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import redis

from lambdapo_async.broker.connection import connect, embedded_server, redis_executable
from tests.contract.broker_world import FOREVER_S, until


def test_our_server_dies_with_its_parent(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from lambdapo_async.broker.connection import embedded_server\n"
        "with embedded_server(pathlib.Path(sys.argv[1])) as url:\n"
        "    print(url, flush=True); sys.stdin.read()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout is not None
        url = parent.stdout.readline().strip()
        with contextlib.closing(connect(url, timeout_s=FOREVER_S)) as client:
            assert client.ping()
            parent.kill()
            until(lambda: not _answers(client))


def test_our_server_keeps_its_data(tmp_path: Path) -> None:
    for expected in (None, b"value"):
        with (
            embedded_server(tmp_path) as url,
            contextlib.closing(connect(url, timeout_s=FOREVER_S)) as client,
        ):
            assert client.get("name") == expected
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            client.set("name", b"value")


def test_our_server_starts_again_while_a_child_of_the_killed_one_lives(tmp_path: Path) -> None:
    with embedded_server(tmp_path) as url, contextlib.closing(connect(url, timeout_s=FOREVER_S)) as client:
        client.set("name", b"value")
        client.config_set("rdb-key-save-delay", 5_000_000)  # microseconds: the child saves, and holds our socket
        client.bgsave()
        os.kill(client.info("server")["process_id"], signal.SIGKILL)
        with (
            embedded_server(tmp_path) as url_again,
            contextlib.closing(connect(url_again, timeout_s=FOREVER_S)) as again,
        ):
            assert again.get("name") == b"value"


def test_valkey_serves_where_redis_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, version in (("redis-server", "Redis server v=6.0.16"), ("valkey-server", "Valkey server v=8.0.1")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{version} sha=00000000:0'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert redis_executable() == str(tmp_path / "valkey-server")


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except (redis.ConnectionError, redis.TimeoutError):
        return False


def test_our_server_keeps_the_memory_of_large_replies(tmp_path: Path) -> None:
    """Given back to the kernel, it would be faulted in again for each: a thousand pages."""
    names, num_replies = [f"payload:{number}" for number in range(20)], 20
    with embedded_server(tmp_path) as url, contextlib.closing(connect(url, timeout_s=FOREVER_S)) as client:
        server = client.info("server")["process_id"]
        for name in names:
            client.set(name, bytes(200_000))
        client.mget(names)
        before = _minor_faults(server)
        for _ in range(num_replies):
            client.mget(names)
        assert _minor_faults(server) - before < num_replies * 100


def _minor_faults(process_id: int) -> int:
    _, _, fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")
    return int(fields.split()[7])
