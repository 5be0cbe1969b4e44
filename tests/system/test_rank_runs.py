"""Whole learners on several ranks, started, suspended and resumed as a user does it."""

import signal
from pathlib import Path
from typing import Protocol

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from learner.character_tokenizer import build_tokenizer
from tests.processes import Process, wait_until
from tests.scripted_run import CONFIG_FILE, acting, settings
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.system

RUN_S = 120.0


class RunOf(Protocol):
    """A learner's arguments for a run id, and more of them."""

    def __call__(self, run_id: str, *more: str) -> tuple[str, ...]: ...


def learner(num_ranks: int, log: Path, *arguments: str) -> Process:
    """A whole learner, on one rank or under torchrun."""
    launched = ("learner",) if num_ranks == 1 else ("learner.launch", str(num_ranks))
    return Process(*launched, *arguments, log=log)


def learn(num_ranks: int, log: Path, *arguments: str) -> None:
    """Run a learner to its end."""
    process = learner(num_ranks, log, *arguments)
    try:
        assert process.wait(timeout_s=RUN_S) == 0, process.log_tail()
    finally:
        process.kill()  # the ranks die with torchrun


def weights_after(folder: Path, step: int) -> dict[str, Tensor]:
    (checkpoint,) = (folder / "checkpoints").glob(f"step-{step:08d}.*")
    return load_file(checkpoint / "model" / "model.safetensors")


@pytest.fixture
def run_of(tmp_path: Path, redis_url: str) -> RunOf:
    """For runs of a tiny model."""
    tokenizer = build_tokenizer(64)
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config_path = tmp_path / "run.toml"
    config_path.write_text(CONFIG_FILE.format(model=tmp_path / "model"))

    def arguments(run_id: str, *more: str) -> tuple[str, ...]:
        place = ("--redis-url", redis_url, "--run-id", run_id, "--set", f"output_dir={tmp_path}")
        return (str(config_path), *place, *more)

    return arguments


@pytest.mark.timeout(400)
def test_a_run_of_two_ranks_is_that_of_one_and_resumes_in_context_and_on_one(
    tmp_path: Path, redis_url: str, run_of: RunOf
) -> None:
    config = settings(rollout={"groups_per_step": 2})
    with acting(redis_url, "two-ranks", config):
        learn(2, tmp_path / "two.log", *run_of("two-ranks"))
        context = ("--set", "learner.context_parallel=2")
        learn(2, tmp_path / "context.log", *run_of("two-ranks", "--resume", "--set", "learner.num_steps=4", *context))
        learn(1, tmp_path / "resumed.log", *run_of("two-ranks", "--resume", "--set", "learner.num_steps=5"))
    with acting(redis_url, "one-rank", config):
        learn(1, tmp_path / "one.log", *run_of("one-rank", "--set", "learner.num_steps=5"))
    start_of, one, two = (tmp_path / name for name in ("model", "one-rank", "two-ranks"))
    begun = load_file(start_of / "model.safetensors")
    for step in (3, 4, 5):
        expected, found = weights_after(one, step), weights_after(two, step)
        assert not torch.equal(expected["model.norm.weight"], begun["model.norm.weight"])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.timeout(200)
def test_sigterm_suspends_all_ranks_with_status_0(tmp_path: Path, redis_url: str, run_of: RunOf) -> None:
    with acting(redis_url, "suspended", settings(rollout={"groups_per_step": 2})):
        process = learner(2, tmp_path / "log", *run_of("suspended", "--set", "learner.num_steps=1000"))
        try:
            saved = tmp_path / "suspended" / "checkpoints"
            wait_until(lambda: any(saved.glob("step-00000002.*")), "two steps", timeout_s=RUN_S, alive=process)
            process.send(signal.SIGTERM)
            assert process.wait(timeout_s=RUN_S) == 0, process.log_tail()
        finally:
            process.kill()
    assert "suspended at step" in process.log_tail()


@pytest.mark.timeout(200)
def test_a_users_mistake_ends_all_ranks_with_status_2_and_no_traceback(tmp_path: Path, run_of: RunOf) -> None:
    process = learner(2, tmp_path / "log", *run_of("wrong", "--set", "learner.lr=-1"))
    assert process.wait(timeout_s=RUN_S) == 2, process.log_tail()
    assert "learner.lr" in process.log_tail()
    assert "Traceback" not in process.log_tail()
