"""`lambdapo doctor` on real servers: one of ours is fine, and every wrong setting is named with its remedy."""

import contextlib
from pathlib import Path

import pytest
import redis
from typer.testing import CliRunner

from lambdapo_async.broker.connection import connect
from lambdapo_async.broker.doctor import Finding, examine
from lambdapo_async.cli.app import app
from lambdapo_async.cli.doctor import diagnose
from lambdapo_async.config.sections import BrokerConfig
from lambdapo_async.errors import BrokerUnreachableError
from tests.redis_fixtures import TIMEOUT_S
from tests.redis_server import AOF, own_server

MAX_BYTES = BrokerConfig().max_bytes


def problems(findings: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.problem for finding in findings if finding.problem is not None}


def test_a_server_of_ours_is_right(redis_url: str) -> None:
    result = CliRunner().invoke(app, ["doctor", redis_url])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert len(lines) == 10
    assert all(line.startswith("ok ") for line in lines)


@pytest.mark.parametrize(
    ("name", "wrong", "remedy"),
    [
        ("maxmemory", "1gb", "set it to 2894069760 or more"),
        ("maxmemory", "0", "set it to 2894069760 or more"),
        ("maxmemory-policy", "allkeys-lru", 'set it to "noeviction": any other silently deletes payloads'),
        ("appendonly", "no", 'set it to "yes"'),
        ("appendfsync", "always", 'set it to "everysec"'),
        ("save", "60 1", 'set it to ""'),
        ("client-output-buffer-limit", "normal 0 0 0", "normal 64mb 32mb 30"),
        ("client-output-buffer-limit", "normal 1mb 1mb 1", "too small"),
        ("client-query-buffer-limit", "1mb", "set it to 67108864"),
    ],
)
def test_what_is_wrong_is_named(server: redis.Redis, redis_url: str, name: str, wrong: str, remedy: str) -> None:
    right = server.config_get(name)[name]
    server.config_set(name, wrong)
    try:
        result = CliRunner().invoke(app, ["doctor", redis_url])
        found = problems(examine(server, redis_url, max_bytes=MAX_BYTES))
    finally:
        server.config_set(name, right)
    assert result.exit_code == 2
    assert [line for line in result.output.splitlines() if line.startswith(f"FAIL {name} ")]
    assert set(found) == {name}
    assert remedy in found[name]


def test_what_a_config_needs_is_counted(redis_url: str) -> None:
    big = ["--set", "broker.max_bytes=9000000000"]
    result = CliRunner().invoke(app, ["doctor", redis_url, "--config", "configs/arithmetic_demo.toml", *big])
    assert (result.exit_code, "broker.max_bytes (9000000000)" in result.output) == (2, True)


@pytest.mark.parametrize(
    ("url", "is_right"),
    [
        ("redis://far:6379", False),
        ("rediss://far:6379", True),
        ("redis://127.0.0.1:1", True),
        ("redis://[::1]:1", True),
    ],
)
def test_an_unencrypted_network_is_named(server: redis.Redis, url: str, is_right: bool) -> None:
    assert ("transport" not in problems(examine(server, url, max_bytes=MAX_BYTES))) is is_right


@pytest.mark.parametrize(
    ("settings", "is_right"),
    [
        (("bind 0.0.0.0", "protected-mode no"), False),
        (("bind 0.0.0.0", "protected-mode yes"), True),
        (("bind 0.0.0.0", "protected-mode no", "requirepass secret"), True),
        (("bind 127.0.0.1", "protected-mode no"), True),
    ],
)
def test_an_open_door_is_named(tmp_path: Path, unused_tcp_port: int, settings: tuple[str, ...], is_right: bool) -> None:
    password = "secret" if "requirepass secret" in settings else None
    with own_server(tmp_path, (*AOF, f"port {unused_tcp_port}", *settings), password=password) as own:
        found = problems(examine(own.client, own.url, max_bytes=1))
    assert ("access" not in found) is is_right


def test_a_server_without_answers_is_the_users_to_fix(tmp_path: Path) -> None:
    with pytest.raises(BrokerUnreachableError, match="did not answer"):
        diagnose(f"unix://{tmp_path}/nobody", max_bytes=1)


def test_what_a_user_may_not_see_is_a_finding(server: redis.Redis, redis_url: str) -> None:
    server.execute_command("ACL", "SETUSER", "guest", "on", ">pw", "+info", "~*")
    try:
        url = redis_url.replace("unix://", "unix://guest:pw@")
        with contextlib.closing(connect(url, timeout_s=TIMEOUT_S)) as client:
            found = problems(examine(client, url, max_bytes=MAX_BYTES))
    finally:
        server.execute_command("ACL", "DELUSER", "guest")
    assert set(found) == {"CONFIG GET"}
    assert "administrator" in found["CONFIG GET"]
