"""Whose run it is, when what a learner reads goes away under its hands."""

import shutil
from pathlib import Path

import pytest

from lambdapo_async.errors import CheckpointError, FencedError
from learner.fence import take_fence, unless_fenced


def test_a_learner_that_loads_what_its_successor_deleted_says_whose_the_run_is(tmp_path: Path) -> None:
    fence, checkpoint = take_fence(tmp_path), tmp_path / "step-00000008.1"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(b"weights")

    def load() -> None:
        with unless_fenced(tmp_path, fence):
            take_fence(tmp_path)  # the successor's, which prunes while we read
            shutil.rmtree(checkpoint)
            (checkpoint / "model.safetensors").read_bytes()

    with pytest.raises(FencedError, match="this learner holds fence 1, but fence 2 was taken since: stop it"):
        load()


@pytest.mark.parametrize("error", [FileNotFoundError("no model.safetensors"), CheckpointError("it is damaged")])
def test_a_load_that_fails_in_our_own_run_says_what_failed(tmp_path: Path, error: Exception) -> None:
    fence = take_fence(tmp_path)
    with pytest.raises(type(error)) as caught, unless_fenced(tmp_path, fence):
        raise error
    assert caught.value is error


def test_a_load_that_succeeds_is_not_asked_whose_the_run_is(tmp_path: Path) -> None:
    with unless_fenced(tmp_path, take_fence(tmp_path)):
        take_fence(tmp_path)
