import contextlib
import re

import pytest

from lambdapo_async.broker.heartbeat import Heartbeat
from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.cli.app import app
from lambdapo_async.cli.errors import run_main
from tests.redis_fixtures import next_run_id


def heartbeat(name: str, **changes: object) -> Heartbeat:
    fields = {
        "actor_id": name, "host": "node", "pid": 7, "state": "sampling", "device": "cpu", "dtype": "bfloat16",
        "engine": "scripted 1", "policy_version": 3, "groups_in_flight": 2, "groups_sent": 1234, "completions": 9,
        "tokens": 80, "tokens_per_s": 40.4, "idle_share": 0.25, "sent_at": 0.0,
    }  # fmt: skip
    return Heartbeat.model_validate({**fields, **changes})


def actors(*arguments: str) -> int:
    """Exit status of ``lambdapo actors ARGUMENTS``."""
    with pytest.raises(SystemExit) as ended:
        run_main(app, ["actors", *arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture
def run_id(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("COLUMNS", "80")
    return next_run_id()


def test_every_actor_and_what_it_counted_are_shown(
    run_id: str, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.closing(RedisRun(redis_url, run_id, timeout_s=10)) as run:
        run.run_store.create(b"{}", {}, fence=1)
        run.fleet.beat(heartbeat("b", state="quarantined", counters={"leases_lost": 2.0, "groups_late": 0.0}))
        run.fleet.beat(heartbeat("a", counters={"leases_lost": 5.0, "weight_bytes": 1.6e6}))
    assert actors("--run-id", run_id) == 0
    lines = [re.split(r" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    engine = ["node:7", "cpu", "bfloat16", "scripted 1", "3", "2", "1,234", "9", "80", "40", "25%"]
    assert ["a", "sampling", *engine] in lines
    assert ["b", "quarantined", *engine] in lines
    assert ["2 actors (1 quarantined, 1 sampling), 81 tokens/s"] in lines
    assert ["leases_lost", "7", "5", "a"] in lines
    assert ["weight_bytes", "1,600,000", "1,600,000", "a"] in lines
    assert not any(cells[0] == "groups_late" for cells in lines)


def test_a_run_without_actors_says_so(run_id: str, redis_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.closing(RedisRun(redis_url, run_id, timeout_s=10)) as run:
        run.run_store.create(b"{}", {}, fence=1)
    assert actors("--run-id", run_id) == 0
    assert "no actor takes part now" in capsys.readouterr().out


def test_a_run_that_is_not_there_is_a_users_error(run_id: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert actors("--run-id", run_id) == 2
    assert run_id in capsys.readouterr().err
