"""An actor that comes before its run is published waits for it, and says which other runs there are."""

import contextlib
import json
import logging
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from actors.__main__ import app
from actors.session import read_run, write_model_files
from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.cli.errors import USER_ERROR_STATUS, run_main
from lambdapo_async.config import RunConfig
from lambdapo_async.config.sections import ArithmeticTask, ModelConfig
from lambdapo_async.errors import RunNotFoundError, RunNotPublishedError
from tests.redis_fixtures import TIMEOUT_S
from tests.redis_server import RedisServer, own_server

RUN_ID = "spring-7b"
CONFIG_JSON = json.dumps(RunConfig(model=ModelConfig(path="some/model"), task=ArithmeticTask()).published()).encode()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis that holds nothing."""
    with own_server(tmp_path) as server:
        yield server


@contextlib.contextmanager
def learner_of(server: RedisServer, run_id: str = RUN_ID) -> Iterator[RedisRun]:
    with contextlib.closing(RedisRun(server.url, run_id, timeout_s=TIMEOUT_S)) as run:
        yield run


def publish(run: RedisRun) -> None:
    run.run_store.create(CONFIG_JSON, {"config.json": b"{}"}, fence=1)
    for split in ("train", "heldout"):
        run.run_store.put_rows(split, [])


class OnceTold(logging.Handler):
    """Does something when the actor says what it waits for."""

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__()
        self._act = act
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())
        self._act()


@contextlib.contextmanager
def once_told(act: Callable[[], None]) -> Iterator[list[str]]:
    handler, logger = OnceTold(act), logging.getLogger("actors.publication")
    logger.addHandler(handler)
    try:
        yield handler.told
    finally:
        logger.removeHandler(handler)


def join(server: RedisServer) -> RunConfig:
    run, config = read_run(server.url, RUN_ID, [], publication_s=TIMEOUT_S)
    run.close()
    return config


def test_an_actor_waits_for_the_first_publication(server: RedisServer) -> None:
    with learner_of(server) as learner, once_told(lambda: publish(learner)) as told:
        assert join(server).model.path == "some/model"
    assert told == [
        "this Redis holds no run 'spring-7b': check the run id and the URL; "
        f"waiting up to {TIMEOUT_S:g} s for its learner to publish it"
    ]


def test_an_actor_waits_for_a_learner_that_is_about_to_publish_beside_others(server: RedisServer) -> None:
    """Its model is being loaded, so only its fence is there."""
    with learner_of(server, "spring-70b") as other, learner_of(server) as learner:
        publish(other)
        learner.run_store.take_over(fence=1)
        with once_told(lambda: publish(learner)):
            assert join(server).model.path == "some/model"


@pytest.mark.parametrize("missing", ["train", "heldout"])
def test_an_actor_waits_for_the_last_rows(server: RedisServer, missing: str) -> None:
    with learner_of(server) as learner:
        publish(learner)
        server.client.hdel(learner.keys.state, f"rows_{missing}")
        with once_told(lambda: publish(learner)) as told:
            join(server)
    assert f"has no {missing} rows yet" in told[0]


def test_an_actor_waits_for_model_files_that_redis_lost(server: RedisServer) -> None:
    with learner_of(server) as learner:
        publish(learner)
        server.client.delete(learner.keys.model_files)
        with once_told(lambda: publish(learner)) as told:
            join(server)
    assert "has no model files yet" in told[0]


def test_an_actor_waits_for_model_files_that_redis_loses_while_it_joins(server: RedisServer, tmp_path: Path) -> None:
    with learner_of(server) as learner:
        publish(learner)
        run, _ = read_run(server.url, RUN_ID, [], publication_s=TIMEOUT_S)
        with contextlib.closing(run):
            server.client.delete(learner.keys.model_files)
            with once_told(lambda: publish(learner)) as told:
                folder = write_model_files(run, tmp_path)
    assert (folder / "config.json").read_bytes() == b"{}"
    assert "has no model files yet" in told[0]


def test_the_wait_ends_with_the_same_error(server: RedisServer) -> None:
    with pytest.raises(RunNotPublishedError, match="holds no run 'spring-7b': check the run id and the URL"):
        read_run(server.url, RUN_ID, [], publication_s=0.0)


def test_an_actor_waits_for_the_second_run_of_a_redis(server: RedisServer) -> None:
    with learner_of(server, "spring-70b") as other, learner_of(server) as learner:
        publish(other)
        with once_told(lambda: publish(learner)) as told:
            assert join(server).model.path == "some/model"
    assert told == [
        "this Redis holds no run 'spring-7b': check the run id and the URL (it holds 'spring-70b'); "
        f"waiting up to {TIMEOUT_S:g} s for its learner to publish it"
    ]


def test_a_mistyped_run_id_is_told_at_once_with_the_nearest_names(server: RedisServer) -> None:
    for run_id in ("spring-70b", "autumn-1", "spring-8b", "winter-2", "spring-7b-long"):
        with learner_of(server, run_id) as run:
            publish(run)
    said = (
        "this Redis holds no run 'spring-7b': check the run id and the URL "
        "(it holds 'spring-70b', 'spring-8b', 'spring-7b-long' and others)"
    )
    with pytest.raises(RunNotPublishedError, match=f"^{re.escape(said)}$"):
        read_run(server.url, RUN_ID, [], publication_s=0.0)
    with learner_of(server) as learner, once_told(lambda: publish(learner)) as told:
        join(server)
    assert told == [f"{said}; waiting up to {TIMEOUT_S:g} s for its learner to publish it"]


def test_a_run_of_another_schema_is_not_waited_for(server: RedisServer) -> None:
    with learner_of(server) as learner:
        publish(learner)
        server.client.hset(learner.keys.state, "schema", 99)
    with once_told(lambda: None) as told, pytest.raises(RunNotFoundError, match="speaks schema 99"):
        join(server)
    assert told == []


def test_another_schema_is_one_line_and_exit_code_2(server: RedisServer, capsys: pytest.CaptureFixture[str]) -> None:
    with learner_of(server) as learner:
        publish(learner)
        server.client.hset(learner.keys.state, "schema", 1)
    with pytest.raises(SystemExit) as exited:
        run_main(app, ["--run-id", RUN_ID, "--redis-url", server.url, "--dry-run"])
    assert exited.value.code == USER_ERROR_STATUS
    (line,) = capsys.readouterr().err.splitlines()
    assert "run spring-7b speaks schema 1, this version speaks 3" in line


def test_a_dry_run_waits_for_nothing(server: RedisServer, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        run_main(app, ["--run-id", RUN_ID, "--redis-url", server.url, "--dry-run"])
    assert exited.value.code == USER_ERROR_STATUS
    assert "holds no run 'spring-7b'" in capsys.readouterr().err


def test_sigterm_ends_the_wait(server: RedisServer) -> None:
    command = [sys.executable, "-m", "actors", "--run-id", RUN_ID, "--redis-url", server.url]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as actor:
        assert actor.stderr is not None
        assert "waiting up to 600 s" in actor.stderr.readline()
        actor.terminate()
        _, errors = actor.communicate(timeout=TIMEOUT_S)
    assert (actor.returncode, errors) == (0, ""), signal.Signals(-actor.returncode).name
