"""The scripts that people start learner and actors with."""

import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
PATH = "/usr/bin:/bin"


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """An environment whose Python says what it was asked."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "$REDIS_URL" "$@"\n')
    python.chmod(0o755)
    return tmp_path


def run(script: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPTS / script, *arguments],
        env={"PATH": PATH, **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("environ", "arguments", "expected"),
    [
        ({}, ["redis://:hunter2@h", "r1", "--dry-run"], "redis://:hunter2@h -m actors --run-id r1 --dry-run"),
        ({"REDIS_URL": "redis://e"}, ["r1"], "redis://e -m actors --run-id r1"),
    ],
)
def test_launch_actor_keeps_the_url_out_of_the_process_list(
    venv: Path, environ: dict[str, str], arguments: list[str], expected: str
) -> None:
    done = run("launch_actor.sh", *arguments, LAMBDAPO_VENV=str(venv), **environ)
    assert (done.returncode, done.stdout.strip()) == (0, expected), done.stderr


@pytest.mark.parametrize("arguments", [["redis://h"], ["--help"], ["redis://h", "--help"]])
def test_launch_actor_shows_its_usage(venv: Path, arguments: list[str]) -> None:
    done = run("launch_actor.sh", *arguments, LAMBDAPO_VENV=str(venv))
    assert (done.returncode, done.stdout) == (2, "")
    assert "RUN_ID" in done.stderr


def test_launch_actor_tells_an_address_from_a_run_id(venv: Path) -> None:
    done = run("launch_actor.sh", ":hunter2@host:6379", "r1", LAMBDAPO_VENV=str(venv))
    assert (done.returncode, done.stdout) == (2, "")
    assert "begin a URL with redis://" in done.stderr
    assert "hunter2" not in done.stderr


@pytest.mark.parametrize(("ranks", "started"), [("1", "-m learner c.toml"), ("2", "-m learner.launch 2 c.toml")])
def test_launch_learner_starts_as_many_ranks_as_asked(venv: Path, ranks: str, started: str) -> None:
    done = run("launch_learner.sh", "c.toml", LAMBDAPO_VENV=str(venv), LAMBDAPO_RANKS=ranks)
    assert done.returncode == 0
    assert started in done.stdout


@pytest.mark.parametrize("ranks", ["two", "0", "-1", "1.5"])
def test_launch_learner_refuses_what_is_no_number_of_ranks(venv: Path, ranks: str) -> None:
    done = run("launch_learner.sh", "c.toml", LAMBDAPO_VENV=str(venv), LAMBDAPO_RANKS=ranks)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"LAMBDAPO_RANKS={ranks}" in done.stderr


@pytest.mark.parametrize(
    ("script", "arguments"), [("launch_learner.sh", ["c.toml"]), ("launch_actor.sh", ["r1"]), ("redis-acl", [])]
)
def test_a_missing_environment_is_one_line(tmp_path: Path, script: str, arguments: list[str]) -> None:
    done = run(script, *arguments, LAMBDAPO_VENV=str(tmp_path / "none"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert "run scripts/setup first" in done.stderr
    assert done.stderr.count("\n") == 1


def test_setup_shows_its_usage() -> None:
    done = run("setup", "--fast")
    assert done.returncode == 2
    assert "scripts/setup [--dev]" in done.stderr
