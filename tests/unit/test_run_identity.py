"""A run id means one config, one Redis and one folder."""

from pathlib import Path

import pytest
import redis

from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.config import RunConfig
from lambdapo_async.errors import ConfigError, RunNotFoundError, UserError
from lambdapo_async.report.run_folder import RunFolderError, write_header
from learner.run_identity import check_same_config, refuse_other_schema, refuse_taken_id
from tests.fakes_broker import FakeRun
from tests.full_disk import full_disk

TREE = {"model": {"path": "starter"}, "task": {"kind": "arithmetic"}}


def config(**sections: object) -> RunConfig:
    return RunConfig.model_validate({**TREE, **sections})


def test_a_fresh_start_may_not_take_an_id_that_redis_knows() -> None:
    run = FakeRun("x")
    refuse_taken_id(run.run_store, "x")
    run.run_store.create(b"{}", {}, fence=1)
    with pytest.raises(ConfigError, match="already holds run x: add --resume"):
        refuse_taken_id(run.run_store, "x")


def test_a_run_of_another_schema_is_neither_taken_nor_resumed(redis_run: RedisRun, redis_url: str) -> None:
    store, run_id = redis_run.run_store, redis_run.keys.run_id
    refuse_other_schema(store)  # not in this Redis, or not any more: a resumed learner brings it back
    store.create(b"{}", {}, fence=1)
    refuse_other_schema(store)
    with redis.Redis.from_url(redis_url) as client:
        client.hset(redis_run.keys.state, "schema", 1)
    said = f"run {run_id} speaks schema 1, this version speaks 3: install"
    with pytest.raises(RunNotFoundError, match=said):
        refuse_taken_id(store, run_id)
    with pytest.raises(RunNotFoundError, match=said) as caught:
        refuse_other_schema(store)
    assert isinstance(caught.value, UserError), "one line, exit code 2"


def test_the_optimizer_may_change_on_resume(tmp_path: Path) -> None:
    write_header(tmp_path, "x", config())
    check_same_config(tmp_path, config(learner={"lr": 3e-6, "num_steps": 7}))


@pytest.mark.parametrize(
    ("sections", "name"),
    [
        ({"sampling": {"temperature": 0.7}}, "sampling.temperature"),
        ({"rollout": {"group_size": 4}}, "rollout.group_size"),
        ({"task": {"kind": "arithmetic", "digits": 2}}, "task.digits"),
        ({"seed": 1}, "another seed"),
        ({"replay": {"max_uses": 2}}, "replay.max_uses"),
        ({"learner": {"lora": {"rank": 8}}}, "learner.lora"),
    ],
)
def test_what_actors_depend_on_may_not(tmp_path: Path, sections: dict[str, object], name: str) -> None:
    write_header(tmp_path, "x", config())
    with pytest.raises(ConfigError, match=name):
        check_same_config(tmp_path, config(**sections))


def test_adapters_stay_what_they_are(tmp_path: Path) -> None:
    adapters = {"rank": 8, "alpha": 16.0, "target_modules": ["q_proj"]}
    write_header(tmp_path, "x", config(learner={"lora": adapters}))
    check_same_config(tmp_path, config(learner={"lora": adapters, "lr": 3e-6}))
    for other in ({**adapters, "rank": 4}, {**adapters, "alpha": 8.0}, None):
        with pytest.raises(ConfigError, match=r"has another learner\.lora, on which"):
            check_same_config(tmp_path, config(learner={"lora": other}))


def test_a_resume_on_a_full_disk_does_not_damage_what_the_next_one_reads(tmp_path: Path) -> None:
    write_header(tmp_path, "x", config())
    with full_disk(), pytest.raises(RunFolderError, match=r"run\.json cannot be written: .*large; free disk space"):
        write_header(tmp_path, "x", config())
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    check_same_config(tmp_path, config())
