"""SIGTERM while Redis is away: everybody ends in time, says why, and nothing is lost once it is back."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lambdapo_async.keys import RunKeys
from tests.chaos.folders import scene_folder
from tests.chaos.ledger import read_ledger
from tests.chaos.profiles import PROFILES
from tests.chaos.proof import check
from tests.chaos.redis_control import RedisControl
from tests.chaos.remains import read_remains
from tests.chaos.scene import Scene
from tests.chaos.spec import RUN_ID
from tests.chaos.zygote import Forked
from tests.processes import wait_until

EXIT_S = 40.0
"""More than broker.timeout_s and the step of the learner, actor.drain_s and the last calls of an actor; less than
broker.outage_s, after which they would end anyway."""
OUTAGES: dict[str, tuple[Callable[[RedisControl], None], Callable[[RedisControl], None]]] = {
    "gone": (RedisControl.kill, RedisControl.start),
    "frozen": (RedisControl.freeze, RedisControl.thaw),
}
"""How it begins and ends."""


@pytest.fixture
def folder() -> Iterator[Path]:
    with scene_folder("sigterm") as path:
        yield path


@pytest.mark.system
@pytest.mark.timeout(240)
@pytest.mark.parametrize("outage", OUTAGES)
def test_sigterm_during_an_outage_ends_everybody_and_loses_nothing(folder: Path, outage: str) -> None:
    scene, (begin, end) = Scene(folder, PROFILES["everysec"], seed=7), OUTAGES[outage]
    with scene.running():
        scene.wait_for_step(6)
        assert scene.learner is not None
        learner, actors = scene.learner, list(scene.actors)
        # Who has not joined yet has nothing to drain, and ends with 0.
        wait_until(lambda: num_members(scene.redis) >= len(actors), "every actor beats", timeout_s=EXIT_S)
        scene.redis_is_up = False
        begin(scene.redis)
        wait_until(lambda: "did not answer" in log_of(learner), "the learner notices", timeout_s=EXIT_S)
        for process in (learner, *actors):
            scene.expect_end(process)
            process.send(signal.SIGTERM)
        for process in (learner, *actors):
            assert process.wait(EXIT_S) is not None, f"{process.who}: {log_of(process)}"
        for actor in actors:
            assert_says_why(actor)
        assert learner.returncode == 0, log_of(learner)
        assert "suspended at step" in learner.last_line()
        end(scene.redis)
        scene.redis_is_up = True
        scene.wait_for_step(2)
        scene.finish()
        remains = read_remains(folder, scene.redis, [], max_uses=scene.variant.max_uses)
    assert check(read_ledger(folder), remains, scene.variant.bounds) == []
    assert scene.exits == {}


def num_members(server: RedisControl) -> int:
    with contextlib.closing(server.client()) as client:
        return int(client.hlen(RunKeys(RUN_ID).fleet))


def log_of(process: Forked) -> str:
    return process.spec.log.read_text()


def assert_says_why(process: Forked) -> None:
    assert process.returncode == 1, log_of(process)
    assert process.last_line().startswith("error: unix://")
    assert "did not answer" in process.last_line()
    assert "Traceback" not in log_of(process), log_of(process)
