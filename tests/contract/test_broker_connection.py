"""Whom we talk to: URLs, passwords, and servers that are not ours."""

import contextlib
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from lambdapo_async.broker.connection import BrokerRefusedError, redact
from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.errors import BrokerError, BrokerUnavailable
from tests.contract.broker_world import FOREVER_S
from tests.redis_fixtures import TIMEOUT_S


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:secret@h:1/0", "redis://:***@h:1/0"),
        ("rediss://me:secret@h/2", "rediss://me:***@h/2"),
        ("unix:///s?db=1&password=secret", "unix:///s?db=1&password=***"),
        ("redis://h:6379", "redis://h:6379"),
    ],
)
def test_passwords_are_not_shown(url: str, shown: str) -> None:
    assert redact(url) == shown


def test_an_unreachable_redis_is_named_after_the_deadline(tmp_path: Path) -> None:
    run = RedisRun(f"unix://:secret@{tmp_path}/nobody", "r", timeout_s=0.2)
    with pytest.raises(BrokerUnavailable, match=r"unix://:\*\*\*@.*nobody did not answer for \d+\.\d s"):
        run.run_store.state()


@pytest.mark.parametrize("password", ["", ":wrong@"])
def test_a_wrong_password_is_refused_at_once(server: redis.Redis, redis_url: str, password: str) -> None:
    url = redis_url.replace("unix://", f"unix://{password}")
    server.config_set("requirepass", "right")
    try:
        with (
            contextlib.closing(RedisRun(url, "r", timeout_s=TIMEOUT_S)) as run,
            pytest.raises(BrokerRefusedError, match="check user and password") as refused,
        ):
            run.run_store.state()
        assert "wrong@" not in str(refused.value)
        assert ".:" not in str(refused.value)  # the server's own full stop
    finally:
        server.config_set("requirepass", "")


def test_something_else_than_redis_is_refused(tmp_path: Path) -> None:
    with _answering(lambda: b"HTTP/1.1 400 Bad Request\r\n\r\n") as url:
        run = RedisRun(url, "r", timeout_s=0.5)
        with pytest.raises(BrokerError, match=url):
            run.run_store.state()


@pytest.mark.parametrize(
    "url", ["http://h:1", "h:6379", "redis://h:port", "redis://h?foo=1", "redis://h?db=x", "rediss://h?ssl_cert_reqs=x"]
)
def test_what_is_no_redis_url_is_refused(url: str) -> None:
    with pytest.raises(BrokerRefusedError, match="no Redis URL"):
        RedisRun(url, "r", timeout_s=1.0)


@contextlib.contextmanager
def _answering(reply: Callable[[], bytes]) -> Iterator[str]:
    """A server that says the same to everything."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/s")
        listener.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(1 << 16)
                        connection.sendall(reply())

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"unix://{folder}/s"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(FOREVER_S)
