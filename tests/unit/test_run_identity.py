"""A run id means one config, one Redis and one folder."""

from pathlib import Path

import pytest

from lambdapo_async.config import RunConfig
from lambdapo_async.errors import ConfigError
from lambdapo_async.report.run_folder import write_header
from learner.run_identity import check_same_config, refuse_taken_id
from tests.fakes_broker import FakeRun

TREE = {"model": {"path": "starter"}, "task": {"kind": "arithmetic"}}


def config(**sections: object) -> RunConfig:
    return RunConfig.model_validate({**TREE, **sections})


def test_a_fresh_start_may_not_take_an_id_that_redis_knows() -> None:
    run = FakeRun("x")
    refuse_taken_id(run.run_store, "x")
    run.run_store.create(b"{}", {}, fence=1)
    with pytest.raises(ConfigError, match="already holds run x: add --resume"):
        refuse_taken_id(run.run_store, "x")


def test_the_optimizer_may_change_on_resume(tmp_path: Path) -> None:
    write_header(tmp_path, "x", config())
    check_same_config(tmp_path, config(learner={"lr": 3e-6, "num_steps": 7}))


@pytest.mark.parametrize(
    ("sections", "name"),
    [
        ({"sampling": {"temperature": 0.7}}, "sampling.temperature"),
        ({"rollout": {"group_size": 4}}, "rollout.group_size"),
        ({"task": {"kind": "arithmetic", "digits": 2}}, "task.digits"),
        ({"seed": 1}, "seed differ"),
        ({"replay": {"max_uses": 2}}, "replay.max_uses"),
    ],
)
def test_what_actors_depend_on_may_not(tmp_path: Path, sections: dict[str, object], name: str) -> None:
    write_header(tmp_path, "x", config())
    with pytest.raises(ConfigError, match=name):
        check_same_config(tmp_path, config(**sections))
