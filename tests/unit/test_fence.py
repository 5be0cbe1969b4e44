"""The fence: whose run it is, when two learners write, and when what one reads goes away under its hands."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from lambdapo_async.errors import CheckpointError, FencedError
from learner.checkpoint import CheckpointStore
from learner.fence import check_owner, take_fence, unless_fenced
from learner.policy import Policy
from tests.checkpoints import load, owner, state, steps_in
from tests.tiny_models import tiny_model_folder


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    return load(tiny_model_folder(tmp_path / "start"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


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


def test_fences_only_grow(folder: Path) -> None:
    assert [CheckpointStore(folder).take_fence() for _ in range(3)] == [1, 2, 3]


def test_racing_learners_win_different_fences(folder: Path) -> None:
    barrier = threading.Barrier(8)
    won: list[int] = []

    def race() -> None:
        barrier.wait(30)
        won.append(CheckpointStore(folder).take_fence())

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(won) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_woken_old_learner_can_neither_save_nor_prune(policy: Policy, folder: Path) -> None:
    old = owner(folder)
    old.save(state(1), policy)
    owner(folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(FencedError, match="fence 1, but fence 2"):
        old.save(state(9), policy)
    with pytest.raises(FencedError):
        old.prune(keep=1)
    assert sorted(folder.rglob("*")) == before


def test_a_learner_that_sleeps_while_it_prunes_leaves_its_successors_checkpoint_alone(
    policy: Policy, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = owner(folder)
    old.save(state(1), policy)
    (folder / "partial-step-00000002.fence-1.save-2").mkdir()
    begun = folder / "partial-step-00000003.fence-2.save-1"

    def sleep_after_looking(store: Path, fence: int) -> None:
        check_owner(store, fence)
        owner(folder)
        begun.mkdir()

    monkeypatch.setattr("learner.checkpoint.check_owner", sleep_after_looking)
    old.prune(keep=1)
    assert [path for path in folder.iterdir() if path.name.startswith("partial-")] == [begun]


class SlowPolicy:
    """Saves like a policy, and lets something happen meanwhile."""

    def __init__(self, policy: Policy, meanwhile: Callable[[], object]) -> None:
        self._policy, self._meanwhile = policy, meanwhile
        self.num_updates, self.num_skipped = 0, 0

    def save_model(self, folder: Path) -> None:
        self._policy.save_model(folder)
        self._meanwhile()

    def optimizer_state(self) -> dict[str, Tensor]:
        return self._policy.optimizer_state()


def test_a_learner_fenced_off_while_it_writes_does_not_come_up_with_a_checkpoint(policy: Policy, folder: Path) -> None:
    old = owner(folder)
    with pytest.raises(FencedError):
        old.save(state(9), SlowPolicy(policy, lambda: owner(folder)))
    assert steps_in(folder) == []


def test_a_learner_whose_half_written_checkpoint_a_successor_deleted_is_told_so(policy: Policy, folder: Path) -> None:
    old = owner(folder)
    old.save(state(8), policy)
    with pytest.raises(FencedError):
        old.save(state(9), SlowPolicy(policy, lambda: owner(folder).prune(keep=1)))
    assert [name.split(".")[0] for name in steps_in(folder)] == ["step-00000008"]


def test_a_successors_checkpoint_is_newer_than_anything_its_predecessor_wrote(policy: Policy, folder: Path) -> None:
    old = owner(folder)
    late = old.save(state(50), policy)
    owner(folder).save(state(40), policy)
    assert late.exists()
    checkpoint = CheckpointStore(folder).load_latest()
    assert checkpoint is not None
    assert checkpoint.state.step == 40


def test_writing_without_a_fence_is_refused(policy: Policy, folder: Path) -> None:
    with pytest.raises(CheckpointError, match="take_fence"):
        CheckpointStore(folder).save(state(1), policy)
