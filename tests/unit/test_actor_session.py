"""What an actor does before it samples: it trusts little, fails early, and leaves nothing behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from actors.scratch import scratch_folder
from actors.session import _check_model_files, read_run
from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.config import RunConfig
from lambdapo_async.config.sections import ArithmeticTask, JsonlTask, ModelConfig, TaskConfig
from lambdapo_async.errors import (
    BrokerError,
    BrokerUnreachableError,
    ConfigError,
    RunNotFoundError,
    TaskError,
    UserError,
)
from lambdapo_async.rollout import SPLITS
from lambdapo_async.tasks.prompts import PromptEncoder
from lambdapo_async.tasks.registry import build_task

NOBODY = 2**22 + 1
"""A process number above the kernel's largest."""


def config_of(task: TaskConfig) -> RunConfig:
    return RunConfig(model=ModelConfig(path="some/model"), task=task)


def jsonl(**fields: object) -> JsonlTask:
    return JsonlTask.model_validate({"kind": "jsonl", "train_path": "t", "heldout_path": "h", **fields})


@pytest.fixture
def publish(redis_run: RedisRun) -> Callable[[object], str]:
    """Publishes a tree as the run's config; returns the run id."""

    def publish_tree(tree: object) -> str:
        redis_run.run_store.create(json.dumps(tree).encode(), {"config.json": b"{}"}, fence=1)
        for split in SPLITS:
            redis_run.run_store.put_rows(split, [])
        return redis_run.keys.run_id

    return publish_tree


def test_a_run_is_read_with_the_actors_own_settings(publish: Callable[[object], str], redis_url: str) -> None:
    run_id = publish(config_of(ArithmeticTask()).published())
    run, config = read_run(redis_url, run_id, ["actor.max_groups_in_flight=3"])
    run.close()
    assert (config.model.path, config.actor.max_groups_in_flight) == ("some/model", 3)


def test_a_config_of_another_schema_is_refused(publish: Callable[[object], str], redis_url: str) -> None:
    run_id = publish(config_of(ArithmeticTask()).published() | {"config_schema": 7})
    with pytest.raises(RunNotFoundError, match="has schema 7, this version reads 1"):
        read_run(redis_url, run_id, [])


@pytest.mark.parametrize("tree", [[], {}, "x"])
def test_what_is_no_config_is_refused(publish: Callable[[object], str], redis_url: str, tree: object) -> None:
    with pytest.raises(RunNotFoundError, match="schema None"):
        read_run(redis_url, publish(tree), [])


def test_a_reward_that_this_machine_lacks_fails_before_the_engine(
    publish: Callable[[object], str], redis_url: str
) -> None:
    run_id = publish(config_of(jsonl(rewards=["no_such_module:reward"])).published())
    with pytest.raises(TaskError, match="no_such_module"):
        read_run(redis_url, run_id, [])


@pytest.mark.parametrize("override", ["broker.url=redis://:secret@h", "redis://:secret@h", "broker={url='secret'}"])
def test_a_foreign_override_is_named_without_its_value(override: str) -> None:
    with pytest.raises(ConfigError, match="takes everything but actor") as caught:
        read_run("redis://nowhere", "run", [override])
    assert "secret" not in str(caught.value)


def test_an_absent_redis_is_the_users_to_fix(tmp_path: Path) -> None:
    run = RedisRun(f"unix://{tmp_path}/none", "run", timeout_s=0.05)
    with pytest.raises(BrokerUnreachableError, match="is its URL right") as caught:
        run.check_reachable()
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/b", "..", ".", ".hidden", "", "a\0b", "a\nb"])
def test_a_model_file_outside_its_folder_is_refused(name: str) -> None:
    with pytest.raises(BrokerError, match="no plain file name"):
        _check_model_files({"config.json": b"{}", name: b"x"})


def test_model_files_have_a_bounded_size() -> None:
    tokenizer = bytes(64 * 1024**2)
    _check_model_files(dict.fromkeys("abcd", tokenizer))
    with pytest.raises(BrokerError, match="have 335544320 bytes"):
        _check_model_files(dict.fromkeys("abcde", tokenizer))


@pytest.mark.parametrize(
    ("learners", "ours", "message"),
    [
        ("k" * 16, None, "has no key: set LAMBDAPO_HMAC_KEY"),
        (None, "k" * 16, "it is not signed"),
        ("k" * 16, "o" * 16, "signed with another LAMBDAPO_HMAC_KEY"),
    ],
)
def test_an_actor_without_the_runs_key_is_told_at_once(
    redis_run: RedisRun,
    redis_url: str,
    monkeypatch: pytest.MonkeyPatch,
    learners: str | None,
    ours: str | None,
    message: str,
) -> None:
    run_id = redis_run.keys.run_id
    with contextlib.closing(RedisRun(redis_url, run_id, timeout_s=10, hmac_key=learners)) as learner:
        learner.run_store.create(json.dumps(config_of(ArithmeticTask()).published()).encode(), {}, fence=1)
    monkeypatch.delenv("LAMBDAPO_HMAC_KEY", raising=False)
    if ours is not None:
        monkeypatch.setenv("LAMBDAPO_HMAC_KEY", ours)
    with pytest.raises(ConfigError, match=message):
        read_run(redis_url, run_id, [])


def test_folders_of_killed_actors_go_and_others_stay(tmp_path: Path) -> None:
    dead = tmp_path / f"lambdapo-actor-{NOBODY}-abc"
    others = [tmp_path / name for name in (f"lambdapo-actor-{os.getpid()}-abc", "lambdapo-actor-old", "else")]
    for folder in (dead, *others):
        folder.mkdir()
        (folder / "weights").write_bytes(b"1")
    with scratch_folder(tmp_path) as scratch:
        assert scratch.name.startswith(f"lambdapo-actor-{os.getpid()}-")
        assert sorted(tmp_path.iterdir()) == sorted([scratch, *others])
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_a_folder_that_a_process_of_another_container_holds_stays(tmp_path: Path) -> None:
    with scratch_folder(tmp_path) as scratch:
        seen_from_elsewhere = scratch.rename(tmp_path / f"lambdapo-actor-{NOBODY}-abc")
        with scratch_folder(tmp_path):
            assert seen_from_elsewhere.is_dir()


STARTING_ACTOR = """
import sys, time, types
from lambdapo_async.config import RunConfig

class SlowEngine:
    @classmethod
    async def start(cls, folder, *, config, scratch):
        print(scratch, flush=True)
        time.sleep(60)  # blocks the event loop, as vLLM does

sys.modules["actors.vllm_engine"] = types.SimpleNamespace(VllmEngine=SlowEngine)
from actors.session import join_run

run = types.SimpleNamespace(run_store=types.SimpleNamespace(model_files=lambda: {"config.json": b"{}"}))
actor = {"mirror": sys.argv[1]}
config = RunConfig.model_validate({"model": {"path": "m"}, "task": {"kind": "arithmetic"}, "actor": actor})
join_run(run, config, run_id="r", actor_id="a")
"""


@contextlib.contextmanager
def starting_actor(
    mirror: str = "ram", *, tmpdir: Path | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """An actor whose engine never comes up, and its folder."""
    actor = subprocess.Popen(
        [sys.executable, "-c", STARTING_ACTOR, mirror],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | ({} if tmpdir is None else {"TMPDIR": str(tmpdir)}),
    )
    try:
        assert actor.stdout is not None
        yield actor, Path(actor.stdout.readline().decode().strip())
    finally:
        actor.kill()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, -signal.SIGINT)])
def test_a_signal_during_the_start_ends_the_actor_and_leaves_nothing(number: signal.Signals, status: int) -> None:
    with starting_actor() as (actor, scratch):
        assert (scratch / "model" / "config.json").is_file()
        actor.send_signal(number)
        _, errors = actor.communicate(timeout=30)
    assert actor.returncode == status, errors.decode()
    assert not scratch.exists()


@pytest.mark.parametrize("mirror", ["ram", "disk"])
def test_the_mirror_lies_in_memory_or_where_tmpdir_says(mirror: str, tmp_path: Path) -> None:
    with starting_actor(mirror, tmpdir=tmp_path) as (actor, scratch):
        assert scratch.parent == {"ram": Path("/dev/shm"), "disk": tmp_path}[mirror]
        actor.terminate()
        actor.communicate(timeout=30)


class PlainTokenizer:
    """Without a chat template."""

    chat_template = None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [1] * len(text)

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, add_generation_prompt: bool, tokenize: bool
    ) -> str:
        raise AssertionError("there is no template")


def test_chat_needs_a_chat_template() -> None:
    config = config_of(jsonl(chat=True))
    with pytest.raises(ConfigError, match=r"some/model has no chat template: set task\.chat = false"):
        PromptEncoder(PlainTokenizer(), build_task(config), config)
    plain = config_of(jsonl())
    PromptEncoder(PlainTokenizer(), build_task(plain), plain)
