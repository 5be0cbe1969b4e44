import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from lambdapo_async.cli.app import app
from lambdapo_async.cli.errors import run_main
from lambdapo_async.errors import BrokerUnavailable, ConfigError
from lambdapo_async.metrics import STEP, MetricsLog
from learner.__main__ import app as learner_app

CONFIG = """
name = "small"
[model]
path = "starter"
max_length = 64
[task]
kind = "arithmetic"
[sampling]
max_tokens = 32
[broker]
url = "redis://user:hunter2@example:6379"
"""


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(CONFIG)
    return path


def run(*arguments: object) -> int:
    """Exit status of ``lambdapo ARGUMENTS``."""
    with pytest.raises(SystemExit) as exit_info:
        run_main(app, [str(argument) for argument in arguments])
    assert isinstance(exit_info.value.code, int)
    return exit_info.value.code


def test_config_prints_the_resolved_tree_without_the_password(config_path, capsys):
    assert run("config", config_path, "--set", "learner.lr=2e-6", "--set", "seed=7") == 0
    output = capsys.readouterr().out
    tree = json.loads(output)
    assert (tree["learner"]["lr"], tree["seed"], tree["rollout"]["group_size"]) == (2e-6, 7, 8)
    assert "example" in tree["broker"]["url"]
    assert "hunter2" not in output


def test_a_wrong_config_is_one_line_and_status_2(config_path, capsys):
    assert run("config", config_path, "--set", "learner.lrr=1") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert "did you mean lr?" in captured.err


@pytest.mark.parametrize("arguments", [["config"], ["demo", "--actors", "0"], ["demo", "--frobnicate"], ["frobnicate"]])
def test_wrong_usage_is_status_2(arguments):
    assert run(*arguments) == 2


@pytest.mark.parametrize("run_id", ["../elsewhere", "a/b", "a}b", "", ".hidden", "a" * 97, "a\nb"])
@pytest.mark.parametrize("command", [["demo", "--dry-run"], ["actors"]])
def test_a_run_id_is_a_plain_name(command, run_id, capsys):
    assert run(*command, "--run-id", run_id) == 2
    assert "letters, digits" in capsys.readouterr().err


def test_doctor_has_no_config_to_change(capsys):
    assert run("doctor", "unix:///nowhere", "--set", "broker.max_bytes=1") == 2
    assert "--config" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "config", "report"])
def test_every_command_has_help(command, capsys):
    assert run(command, "--help") == 0
    assert "--dry-run" in capsys.readouterr().out


def test_a_demo_needs_a_target(config_path, capsys):
    assert run("demo", "--config", config_path) == 2
    assert "evaluation.target" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("evaluation.every_steps=0", "evaluation.every_steps"),
        ("broker.url=redis://:hunter3@h", "set REDIS_URL"),
        ("broker={url='redis://:hunter3@h'}", "set REDIS_URL"),
    ],
)
def test_what_a_demo_cannot_be_is_refused(config_path, capsys, override, expected):
    assert run("demo", "--config", config_path, "--set", "evaluation.target=0.9", "--set", override, "--dry-run") == 2
    error = capsys.readouterr().err
    assert expected in error
    assert "hunter3" not in error


def test_a_dry_learner_reads_its_rows(config_path, tmp_path, capsys):
    overrides = ["--set", "task.num_train=5", "--set", "task.num_heldout=3", "--set", f"output_dir={tmp_path / 'out'}"]
    with pytest.raises(SystemExit) as ended:
        run_main(learner_app, [str(config_path), "--run-id", "r", *overrides, "--dry-run"])
    assert ended.value.code == 0
    assert "on 5 training and 3 held-out rows" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_dry_learner_misses_its_rows(config_path, tmp_path, capsys):
    config_path.write_text(
        CONFIG.replace('kind = "arithmetic"', 'kind = "jsonl"\ntrain_path = "none.jsonl"\nheldout_path = "none.jsonl"')
    )
    with pytest.raises(SystemExit) as ended:
        run_main(learner_app, [str(config_path), "--set", f"output_dir={tmp_path}", "--dry-run"])
    assert ended.value.code == 2
    assert "none.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("broker.url=http://elsewhere", "is no Redis URL"),
        ("objective.policy_loss.preset=no_such_module:LOSS", "no_such_module"),
    ],
)
def test_a_dry_learner_finds_what_can_be_found_without_redis(config_path, tmp_path, capsys, override, expected):
    with pytest.raises(SystemExit) as ended:
        run_main(learner_app, [str(config_path), "--set", f"output_dir={tmp_path}", "--set", override, "--dry-run"])
    assert ended.value.code == 2
    assert expected in capsys.readouterr().err


def test_a_demo_that_finds_no_redis_at_its_url_ends_before_it_starts_anything(
    config_path, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("REDIS_URL", f"unix://{tmp_path}/nobody")
    monkeypatch.setattr("lambdapo_async.broker.redis_run._FIRST_CONTACT_S", 0.1)
    overrides = ("--set", "evaluation.target=0.9", "--set", f"output_dir={tmp_path}")
    assert run("demo", "--config", config_path, "--run-id", "r", *overrides) == 2
    assert "did not answer" in capsys.readouterr().err
    assert list((tmp_path / "r" / "logs").iterdir()) == []


def test_a_demo_that_cannot_write_is_one_line(config_path, tmp_path, capsys):
    (tmp_path / "file").touch()
    overrides = ("--set", "evaluation.target=0.9", "--set", f"output_dir={tmp_path / 'file'}")
    assert run("demo", "--config", config_path, "--run-id", "r", *overrides) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_dry_demo_says_what_it_would_start_and_starts_nothing(config_path, tmp_path, capsys):
    overrides = ("--set", "evaluation.target=0.9", "--set", f"output_dir={tmp_path / 'outputs'}")
    assert run("demo", "--config", config_path, *overrides, "--run-id", "d1", "--actors", "3", "--dry-run") == 0
    output = capsys.readouterr().out
    for part in ("-m learner", "--run-id d1", "--set evaluation.target=0.9", "3 actors", "reward 0.9 or step 1000"):
        assert part in output
    assert not (tmp_path / "outputs").exists()


def test_a_demo_does_not_write_into_a_folder_that_holds_a_run(config_path, tmp_path, capsys):
    with MetricsLog(tmp_path / "outputs" / "d1" / "metrics.jsonl") as log:
        log.write(STEP, 1, {})
    overrides = ("--set", "evaluation.target=0.9", "--set", f"output_dir={tmp_path / 'outputs'}")
    assert run("demo", "--config", config_path, *overrides, "--run-id", "d1") == 2
    assert "already holds a run" in capsys.readouterr().err


def test_report_rebuilds_the_page(tmp_path, capsys):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.write(STEP, 1, {"reward/mean": 0.5})
    assert run("report", tmp_path, "--dry-run") == 0
    assert not (tmp_path / "report.html").exists()
    assert run("report", tmp_path) == 0
    assert (tmp_path / "report.html").exists()
    assert run("report", tmp_path / "nowhere") == 2
    assert "holds no run" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "module"), [("learner", "learner"), ("actor", "actors")])
def test_learner_and_actor_become_the_module_with_all_arguments(command, module, tmp_path):
    (tmp_path / module).mkdir()
    (tmp_path / module / "__init__.py").touch()
    (tmp_path / module / "__main__.py").write_text("import sys; print(sys.argv[1:]); sys.exit(7)")
    arguments = ["--help", "x.toml", "--set", "a.b=1"]
    done = subprocess.run(
        [sys.executable, "-m", "lambdapo_async.cli.app", command, *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}:{Path.cwd()}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (7, str(arguments)), done.stderr


@pytest.mark.parametrize(
    ("error", "status"), [(ConfigError("a\nb"), 2), (BrokerUnavailable("gone"), 1), (KeyboardInterrupt(), 130)]
)
def test_errors_have_their_status(error, status, capsys):
    failing = typer.Typer(pretty_exceptions_enable=False)

    @failing.command()
    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as exit_info:
        run_main(failing, [])
    assert exit_info.value.code == status
    assert "Traceback" not in capsys.readouterr().err


def test_a_bug_keeps_its_traceback():
    failing = typer.Typer(pretty_exceptions_enable=False)

    @failing.command()
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_main(failing, [])
