"""The checkpoint: complete, verified and resumed bit for bit, or none at all."""

import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lambdapo_async.errors import CheckpointError
from learner import checkpoint as module
from learner.checkpoint import CheckpointStore, write_share
from learner.parallel import Ranks
from learner.policy import Policy
from tests.checkpoints import load, owner, state, steps_in
from tests.full_disk import full_disk
from tests.tiny_models import micro_batch, tiny_model_folder


def train(policy: Policy, steps: range) -> list[float]:
    """Steps whose data and noise depend on the global generators, as a replay's sampling would."""
    norms = []
    for step in steps:
        noise = float(torch.rand(()) + np.random.random() + random.random())
        batch = micro_batch((9, 6), seed=step)
        policy.backward(batch, lambda logprobs_T, noise=noise: -(logprobs_T * noise).sum() / 10)
        norms.append(policy.step())
    return norms


def weights(policy: Policy) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in policy.named_masters()}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("start"))


@pytest.fixture
def policy(start: Path) -> Policy:
    return load(start)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def test_resume_continues_bit_for_bit(policy: Policy, folder: Path) -> None:
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    train(policy, range(3))
    owner(folder).save(state(3), policy)
    expected_norms = train(policy, range(3, 7))
    random.seed(9), np.random.seed(9), torch.manual_seed(9)

    checkpoint = CheckpointStore(folder).load_latest()
    assert checkpoint is not None
    assert checkpoint.state == state(3)
    resumed = load(checkpoint.model_dir)
    checkpoint.restore(resumed)
    assert resumed.num_updates == 3
    assert train(resumed, range(3, 7)) == expected_norms
    torch.testing.assert_close(weights(resumed), weights(policy), rtol=0, atol=0)
    torch.testing.assert_close(resumed.optimizer_state(), policy.optimizer_state(), rtol=0, atol=0)


def test_without_the_optimizer_state_the_continuation_differs(policy: Policy, folder: Path) -> None:
    train(policy, range(3))
    path = owner(folder).save(state(3), policy)
    forgetful = load(path / "model")
    torch.manual_seed(2), np.random.seed(2), random.seed(2)
    train(policy, range(3, 5))
    torch.manual_seed(2), np.random.seed(2), random.seed(2)
    train(forgetful, range(3, 5))
    assert any(
        not torch.equal(a, b) for a, b in zip(weights(forgetful).values(), weights(policy).values(), strict=True)
    )


def test_a_checkpoint_before_the_first_update_resumes(policy: Policy, folder: Path) -> None:
    owner(folder).save(state(0), policy)
    checkpoint = CheckpointStore(folder).load_latest()
    assert checkpoint is not None
    checkpoint.restore(policy)
    assert policy.num_updates == 0


def test_the_model_part_is_a_plain_hugging_face_folder(policy: Policy, folder: Path) -> None:
    train(policy, range(1))
    path = owner(folder).save(state(1), policy)
    loaded = AutoModelForCausalLM.from_pretrained(path / "model", dtype=torch.float32)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, weights(policy)[name])
    assert (path / "model" / "tokenizer.json").read_text() == "{}"


def test_no_checkpoint_is_none(folder: Path) -> None:
    assert CheckpointStore(folder).load_latest() is None
    owner(folder)
    assert CheckpointStore(folder).load_latest() is None


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FILES = [
    "model/model.safetensors",
    "model/config.json",
    "optimizer/shard-00001-model-00001-of-00001.safetensors",
    "random.safetensors",
    "state.json",
    "manifest.json",
]


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_damage_to_any_file_is_found_and_the_older_one_used(
    policy: Policy, folder: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[Path], None]
) -> None:
    train(policy, range(1))
    store = owner(folder)
    store.save(state(1), policy)
    damage(store.save(state(2), policy) / name)
    with caplog.at_level(logging.WARNING):
        checkpoint = CheckpointStore(folder).load_latest()
    assert checkpoint is not None
    assert checkpoint.state.step == 1
    assert "step-00000002" in caplog.text


def test_when_all_are_damaged_the_error_names_them(policy: Policy, folder: Path) -> None:
    store = owner(folder)
    for step in (1, 2):
        flip(store.save(state(step), policy) / "random.safetensors")
    with pytest.raises(CheckpointError, match=r"(?s)step-00000002.*step-00000001"):
        CheckpointStore(folder).load_latest()


def test_a_save_that_was_killed_leaves_no_checkpoint(policy: Policy, folder: Path) -> None:
    store = owner(folder)
    complete = store.save(state(1), policy)
    shutil.copytree(complete, folder / "partial-step-00000002.fence-1.save-2")
    checkpoint = CheckpointStore(folder).load_latest()
    assert checkpoint is not None
    assert checkpoint.state.step == 1
    store.prune(keep=5)
    assert [path.name for path in folder.iterdir() if path.name.startswith("partial")] == []


@pytest.mark.parametrize(
    ("part", "num_bytes", "reason"),
    [
        ("write_share", 0, r"step-00000002\S+ cannot be written: .*File too large"),
        ("write_share", 80_000, r"optimizer state \S+step-00000002\S+: rank 0: .*File too large"),
        ("_write_rest", 0, r"step-00000002\S+ cannot be written: .*File too large"),
        ("write_manifest", 0, r"step-00000002\S+ cannot be written: .*File too large"),
    ],
)
def test_a_full_disk_is_an_error_with_advice_and_costs_that_checkpoint_alone(
    policy: Policy, folder: Path, monkeypatch: pytest.MonkeyPatch, part: str, num_bytes: int, reason: str
) -> None:
    train(policy, range(1))
    store, write = owner(folder), getattr(module, part)
    store.save(state(1), policy)

    def write_without_room(*args: object) -> None:
        with full_disk(num_bytes):
            write(*args)

    monkeypatch.setattr(module, part, write_without_room)
    with pytest.raises(CheckpointError, match=f"{reason}.*; free disk space"):
        store.save(state(2), policy)
    assert sorted(path.name for path in folder.iterdir()) == ["fence-1", "step-00000001.fence-1.save-1"]
    monkeypatch.undo()
    for step in (1, 2):
        checkpoint = CheckpointStore(folder).load_latest()
        assert checkpoint is not None
        assert checkpoint.state.step == step
        store.save(state(step + 1), policy)


def test_a_fence_that_the_disk_refuses_is_an_error_with_advice(folder: Path) -> None:
    with full_disk(), pytest.raises(CheckpointError, match=r"checkpoints cannot be written: .*; free disk space"):
        owner(folder)
    assert CheckpointStore(folder).take_fence() == 2, "a number that was won is not won again"


def test_a_rank_on_other_storage_is_an_error_with_advice(policy: Policy, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"rank 1 does not see .*partial-x.* storage that all share"):
        write_share(tmp_path / "partial-x", policy, Ranks(rank=1, world_size=2))
    assert not (tmp_path / "partial-x").exists()


def test_the_same_step_saved_again_overwrites_nothing_and_is_newer(policy: Policy, folder: Path) -> None:
    store = owner(folder)
    first = store.save(state(5), policy)
    second = store.save(state(5).model_copy(update={"version": 1000}), policy)
    assert first != second
    checkpoint = CheckpointStore(folder).load_latest()
    assert checkpoint is not None
    assert checkpoint.state.version == 1000


def test_prune_keeps_the_newest(policy: Policy, folder: Path) -> None:
    store = owner(folder)
    for step in (8, 9, 10, 11):
        store.save(state(step), policy)
    assert store.prune(keep=2) == state(10).pool.keep_from
    assert [name.split(".")[0] for name in steps_in(folder)] == ["step-00000010", "step-00000011"]
    assert (folder / "fence-1").exists()


def test_a_damaged_checkpoint_does_not_keep_the_journal(policy: Policy, folder: Path) -> None:
    store = owner(folder)
    damaged = store.save(state(8), policy)
    (damaged / "state.json").write_text("{")
    store.save(state(9), policy)
    assert store.prune(keep=2) == state(9).pool.keep_from
