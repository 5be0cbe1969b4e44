"""A wrong config is one line that names the field, the value and what to change."""

import json
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

from lambdapo_async.config import RunConfig, load_config
from lambdapo_async.config.load import parse_published
from lambdapo_async.errors import ConfigError, RunNotFoundError

MINIMAL = '[model]\npath = "starter"\n[task]\nkind = "arithmetic"\n'
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL)
    return path


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, environ={})
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_and_overrides(config_file: Path) -> None:
    config = load_config(config_file, ["learner.lr=1e-5", "name=abc", "staleness.max_staleness=0"], environ={})
    assert (config.learner.lr, config.name, config.staleness.max_staleness) == (1e-5, "abc", 0)
    assert config.rollout.group_size == 8


def test_precedence_of_the_redis_url(config_file: Path) -> None:
    environ = {"REDIS_URL": "redis://from-environment"}
    assert load_config(config_file, environ=environ).broker.url == "redis://from-environment"
    config = load_config(config_file, ["broker.url=redis://from-override"], environ=environ)
    assert config.broker.url == "redis://from-override"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.name)
def test_shipped_configs_are_valid(path: Path) -> None:
    load_config(path, environ={})


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("learner.learning_rat=1", "unknown key learner.learning_rat; valid here: activation_checkpointing, "),
        ("sampling.temperture=1", "unknown key sampling.temperture; did you mean temperature?"),
        ("smapling.temperature=1", "unknown key smapling; did you mean sampling?"),
        ("lr=1", "unknown key lr; did you mean learner.lr?"),
        ("learner.group_size=4", "unknown key learner.group_size; did you mean rollout.group_size?"),
        ("objective.weight=own", "; did you mean objective.advantage.weight?"),
        ("task.kind=arithmetics", "task.kind must be one of arithmetic, jsonl"),
        ("seed=9223372036854775808", "seed = 9223372036854775808: input should be less than"),
        ("learner.num_threads=100000", "input should be less than or equal to 1024"),
        ("name=..", "name = '..': string should match pattern"),
        ("task.digist=2", "unknown key task.digist; did you mean digits?"),
        ("objective.policy_loss.surrogate.eps_low=1", "did you mean eps_lo?"),
        ("learner.lr=-1", "learner.lr = -1: input should be greater than 0"),
        ("learner.lr=inf", "learner.lr = inf: input should be a finite number"),
        ("objective.advantage.shift=nan", "input should be a finite number"),
        ("learner.lora=true", "learner.lora is a section: set its keys (rank, "),
        ("learner.betas=0.9", "learner.betas is a list: write it as learner.betas = [..., ...]"),
        ("sampling=1", "sampling is a section: set its keys ("),
        ("learner.betas=[0.9, 1.0]", "learner.betas.1 = 1.0: input should be less than 1"),
        ("learner.lr=fast", "learner.lr = 'fast': input should be a valid number"),
        ("density.gate=maybe", "density.gate = 'maybe': input should be 'off', 'wrong' or 'always'"),
        ("objective.policy_loss.preset=cipso", "run.toml: objective.policy_loss.preset = 'cipso' is unknown; did you"),
        ("objective.policy_loss.surrogate.dual=1", "surrogate.dual = 1: input should be greater than 1"),
        ('objective.policy_loss.reject=[{statistic="seq_k3"}]', "reject.0: a filter without bounds rejects nothing"),
        ('objective.policy_loss.reject=[{statistic="seq_k3", hi=nan}]', "[-inf, nan] leaves out 0"),
        ('objective.policy_loss.reject=[{statistic="token_ratio", lo=2}]', "[2, inf] leaves out 1, which is token_r"),
        ("learner.activation_offload=true", "run.toml: learner: activation_offload moves what"),
        ("learner", "--set learner: expected section.key=value"),
        ("name.x=1", "name"),
    ],
)
def test_a_wrong_key_or_value_is_named(config_file: Path, override: str, expected: str) -> None:
    assert expected in complaint(config_file, override)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["sampling.max_tokens=4096"], "leaves no room for a prompt"),
        (["learner.micro_batch_tokens=100"], "cannot hold one sequence"),
        (["learner.lora.rank=2", "actor.stale_kv=true"], "set actor.stale_kv = false"),
        (["learner.lora.rank=2", "actor.quantization=fp8_per_channel"], "leave one of them out"),
        (["rollout.group_size=1"], "no pairs"),
        (["rollout.group_size=256"], "actor.max_num_seqs = 128"),
        (["density.gate=wrong", "objective.advantage.std_norm=true"], "std-normalised"),
        (["density.gate=wrong", "objective.advantage.estimator=grpo"], "std-normalised"),
        (["learner.minibatches=2", "objective.policy_loss.preset=cispo"], "trust region"),
        (["learner.minibatches=17", "objective.policy_loss.preset=ppo"], "exceeds rollout.groups_per_step"),
        (["staleness.drop_above=2"], "must exceed staleness.max_staleness = 2"),
        (["replay.samples_per_insert=2"], "asks for more than max_uses = 1 gives: raise max_uses"),
        (["replay.max_uses=2", "replay.samples_per_insert=2", "replay.error_buffer=1"], "raise it to 16"),
        (["replay.min_size=4"], "min_size = 4 holds no sample of 16 groups"),
        (["replay.max_groups=8"], "must hold min_size = 16"),
        (["replay.max_bytes=1000000"], "replay.max_bytes = 1000000 may hold fewer than the 16 groups"),
        (["broker.lease_s=3"], "three times broker.heartbeat_s"),
    ],
)
def test_combinations_are_checked(config_file: Path, overrides: list[str], expected: str) -> None:
    assert expected in complaint(config_file, *overrides)


def test_density_needs_a_reference(config_file: Path) -> None:
    config_file.write_text(
        '[model]\npath = "starter"\n[task]\nkind = "jsonl"\ntrain_path = "a"\nheldout_path = "b"\n'
        '[density]\ngate = "wrong"\n'
    )
    assert "set task.solution_field" in complaint(config_file)


def test_a_template_has_room_for_the_prompt(config_file: Path) -> None:
    config_file.write_text(
        '[model]\npath = "m"\n[task]\nkind = "jsonl"\ntrain_path = "a"\nheldout_path = "b"\ntemplate = "Think."\n'
    )
    assert "task.template = 'Think.': string should match pattern" in complaint(config_file)


def test_a_task_without_rewards_would_reward_everything(config_file: Path) -> None:
    config_file.write_text(
        '[model]\npath = "m"\n[task]\nkind = "jsonl"\ntrain_path = "a"\nheldout_path = "b"\nrewards = []\n'
    )
    assert "task.rewards = []: tuple should have at least 1 item" in complaint(config_file)


def test_all_problems_of_one_file_come_at_once(config_file: Path) -> None:
    message = complaint(config_file, "learner.lr=-1", "rollout.group_siz=2")
    assert "learner.lr" in message
    assert "did you mean group_size?" in message
    message = complaint(config_file, "objective.policy_loss.preset=cipso", "rollout.group_size=1")
    assert "did you mean cispo?" in message
    assert "no pairs" in message


def test_missing_and_broken_files(tmp_path: Path) -> None:
    assert "no such config file" in complaint(tmp_path / "none.toml")
    assert "is a folder" in complaint(tmp_path)
    (tmp_path / "file").touch()
    assert "cannot be read" in complaint(tmp_path / "file" / "run.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[model\n")
    assert "not valid TOML" in complaint(broken)
    broken.write_text('[task]\nkind = "arithmetic"\n')
    assert "model is required" in complaint(broken)


def test_a_password_is_neither_published_nor_shown(config_file: Path) -> None:
    config = load_config(config_file, ["broker.url=redis://:secret@host"], environ={})
    assert "secret" not in str(config.published())
    for override in (
        "broker.url=['redis://:secret@host']",
        "broker=redis://:secret@host",
        "broker.timeout_s=secret",
        "redis://:secret@host",
        "redis://:secret@host?db=1",
    ):
        assert "secret" not in complaint(config_file, override)
    assert "broker.lease_s = -1" in complaint(config_file, "broker.lease_s=-1")


def test_the_published_config_reads_back(config_file: Path) -> None:
    config = load_config(config_file, environ={})
    published = json.dumps(config.published()).encode()
    assert parse_published(published, run_id="r") == config
    assert parse_published(published, ["actor.max_groups_in_flight=3"], run_id="r").actor.max_groups_in_flight == 3
    with pytest.raises(ConfigError, match=r"run r: actor\.drain_s = -1"):
        parse_published(published, ["actor.drain_s=-1"], run_id="r")


@pytest.mark.parametrize("damaged", [b"", b"{", b"\xff"])
def test_a_damaged_published_config_is_named(damaged: bytes) -> None:
    with pytest.raises(RunNotFoundError, match="config of run r is damaged"):
        parse_published(damaged, run_id="r")


def test_minibatches_with_a_trust_region_are_fine(config_file: Path) -> None:
    load_config(config_file, ["learner.minibatches=2", "objective.policy_loss.preset=decoupled"], environ={})


def sections(section: type[BaseModel]) -> set[type[BaseModel]]:
    from lambdapo_async.config.load import _section_of

    inner = [_section_of(field.annotation) for field in section.model_fields.values()]
    return {section}.union(*(sections(found) for found in inner if found is not None))


def test_every_field_is_documented() -> None:
    undocumented = [
        f"{section.__name__}.{name}"
        for section in sections(RunConfig)
        for name, field in section.model_fields.items()
        if field.description is None
    ]
    assert not undocumented


def test_toml_configs_name_only_what_they_change() -> None:
    for path in CONFIGS.glob("*.toml"):
        assert tomllib.loads(path.read_text())["name"]


def test_a_queue_that_cannot_hold_one_step_is_refused(config_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"broker\.max_bytes >= \d+ \(it is 1000000\): raise them"):
        load_config(config_file, ["broker.max_bytes=1000000"], environ={})
    with pytest.raises(ConfigError, match="cannot hold one step"):
        load_config(config_file, ["broker.max_groups=3"], environ={})
