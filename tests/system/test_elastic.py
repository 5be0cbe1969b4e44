"""Actors that come and go in a run whose messages are signed: real Redis, real vLLM, a real learner."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.session import read_run
from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.config.load import HMAC_KEY_VARIABLE
from lambdapo_async.errors import ConfigError
from lambdapo_async.metrics import STEP
from tests.nursery import Nursery
from tests.processes import wait_until
from tests.system.test_run import DEMO, RUN_S, Scene, learner, rows

pytestmark = [pytest.mark.system, pytest.mark.engine, pytest.mark.timeout(1000)]

# Many groups at once, no time to end them, and a gate that engines far ahead of a starved learner do not close: whoever
# is drained leaves some.
NUM_STEPS = 12
OVERRIDES = (
    f"learner.num_steps={NUM_STEPS}",
    f"staleness.max_staleness={50 * NUM_STEPS}", f"staleness.drop_above={99 * NUM_STEPS}",
    "evaluation.every_steps=0", "evaluation.target=2.0",
    "actor.handoff=true", "actor.drain_s=0.001", "actor.max_num_seqs=128",
)  # fmt: skip


@pytest.fixture(scope="module")
def signing_nursery() -> Iterator[Nursery]:
    """Processes inherit the key from here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HMAC_KEY_VARIABLE, "a key of the test's own")
        with Nursery(timeout_s=120.0) as running:
            yield running


def test_another_actor_continues_what_a_drained_one_had_begun(
    redis_url: str, output_dir: Path, signing_nursery: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene("elastic", redis_url, output_dir, signing_nursery, tmp_path)
    run = RedisRun(redis_url, scene.run_id, timeout_s=10.0)

    def counted(name: str) -> float:
        return sum(actor.counters[name] for actor in run.fleet.members())

    with learner(DEMO, *scene.learner_arguments(*OVERRIDES), log=scene.logs / "learner.log") as process:
        scene.wait_open(process)
        leaver, heir = scene.start_actor("leaver"), scene.start_actor("heir")
        wait_until(
            lambda: [actor.state for actor in run.fleet.members()] == ["sampling"] * 2,
            "both actors sample", timeout_s=RUN_S, alive=process,
        )  # fmt: skip
        os.kill(leaver, signal.SIGTERM)
        assert scene.nursery.wait_exit(leaver) == 0
        assert "left the samples of" in (scene.logs / "leaver.log").read_text()
        wait_until(lambda: counted("partials_continued") > 0, "a partial is continued", timeout_s=RUN_S, alive=process)
        assert counted("partial_tokens") > 0
        assert counted("partials_damaged") == 0
        with monkeypatch.context() as patch:
            patch.delenv(HMAC_KEY_VARIABLE)
            with pytest.raises(ConfigError, match=f"no key: set {HMAC_KEY_VARIABLE}"):
                read_run(redis_url, scene.run_id, [])
        assert process.wait(timeout_s=RUN_S) == 0, process.log_tail()
    assert scene.nursery.wait_exit(heir) == 0, "it is told of the run's end"
    run.close()

    last = rows(scene.folder, STEP)[-1]
    assert last.step == NUM_STEPS
    assert (last.values["groups/malformed"], last.values["groups/quarantined"]) == (0, 0)
    assert last.values["actors/mismatch_max"] < 0.02
