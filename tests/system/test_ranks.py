"""A policy over several ranks: trained, checkpointed, resumed on another number of ranks."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lambdapo_async.config.learner import LearnerConfig
from learner.checkpoint import Checkpoint, CheckpointStore, LearnerState, write_share
from learner.crew import Crew, take_orders
from learner.logprobs import LogprobModel
from learner.optimizer import MasterOptimizer
from learner.parallel import ALONE, Ranks
from learner.sharding import full_tensors, shard, whole_tensor
from learner.weight_files import write_weights
from tests.ranks import run_ranks
from tests.tiny_models import micro_batch, tiny_model

CONFIG = LearnerConfig(lr=1e-2, weight_decay=0.1)
STATE = LearnerState(step=2, version=3, consumed=9, next_index=9, watermarks={"a": 4}, totals={})
NUM_BATCHES = 6
"""Per update; one, two or three ranks share them evenly."""


class SlicedPolicy:
    """A tiny model over ranks, saved and restored as the learner's policy is."""

    def __init__(self, ranks: Ranks, model_dir: Path | None = None) -> None:
        self._ranks = ranks
        self._model = tiny_model("qwen3")
        if model_dir is not None:
            weights = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).state_dict()
            self._model.load_state_dict(weights)
        self._forward = LogprobModel(self._model, temperature=1.0)
        shard(self._forward, self._model, ranks)
        self._parameters = dict(self._model.named_parameters())
        self._optimizer = MasterOptimizer(self._parameters, CONFIG)
        self.num_updates = 0
        self.num_skipped = 0

    def update(self) -> float:
        for number in range(self._ranks.rank, NUM_BATCHES, self._ranks.world_size):
            batch = micro_batch((7, 4), seed=100 * self.num_updates + number)
            logprobs_T, _ = self._forward(batch)
            (-(logprobs_T * batch.advantages_T).sum() / 50).backward()
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), 1.0)
        self._optimizer.step(lr=CONFIG.lr)
        self._optimizer.zero_grad()
        self.num_updates += 1
        return float(whole_tensor(norm))

    def named_masters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._parameters.items():
            yield name, parameter.detach()

    def weights(self) -> dict[str, Tensor]:
        return dict(full_tensors(self.named_masters(), self._ranks))

    def save_model(self, folder: Path) -> None:
        write_weights(folder, full_tensors(self.named_masters(), self._ranks), file_bytes=2**16)
        if self._ranks.is_main:
            self._model.config.save_pretrained(folder)

    def optimizer_state(self) -> dict[str, Tensor]:
        return self._optimizer.state()

    def load_optimizer_state(self, moments: Mapping[str, Tensor], *, num_updates: int, num_skipped: int) -> None:
        self._optimizer.load_state(moments)
        self.num_updates, self.num_skipped = num_updates, num_skipped


class Duties:
    """What another rank does for a step and a checkpoint."""

    def __init__(self, ranks: Ranks, policy: SlicedPolicy) -> None:
        self._ranks, self._policy = ranks, policy

    def train(self, groups: object, *, version: int) -> None:
        self._policy.update()

    def publish(self) -> None:
        self._policy.weights()

    def save(self, folder: Path) -> None:
        write_share(folder, self._policy, self._ranks)


def start(ranks: Ranks, folder: Path) -> dict[str, object]:
    """Two updates, a checkpoint, two more updates; what they lead to."""
    policy = SlicedPolicy(ranks)
    norms = []
    if ranks.is_main:
        crew, store = Crew(ranks), CheckpointStore(folder, ranks)
        store.take_fence()
        for step in range(4):
            crew.train([], version=step)
            norms.append(policy.update())
            if step == 1:
                store.save(STATE, policy)
        crew.publish()
        weights = policy.weights()
        crew.finish()
        return {"norms": norms[2:], "weights": weights}
    take_orders(ranks, Duties(ranks, policy), vocab_size=61)
    return {}


def resume(ranks: Ranks, folder: Path) -> dict[str, object]:
    """Rank 0 finds and verifies the checkpoint and names it to the others; then the last two updates."""
    latest = CheckpointStore(folder).load_latest() if ranks.is_main else None
    checkpoint = Checkpoint.open(Path(ranks.share(str(latest.folder if latest else "").encode()).decode()))
    policy = SlicedPolicy(ranks, checkpoint.model_dir)
    checkpoint.restore(policy, ranks)
    assert checkpoint.state == STATE
    assert policy.num_updates == 2
    return {"norms": [policy.update() for _ in range(2)], "weights": policy.weights()}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """The checkpoints of two ranks, and how they went on."""
    folder = tmp_path_factory.mktemp("checkpoints")
    outcome = run_ranks(tmp_path_factory.mktemp("results"), 2, start, folder)[0]
    assert isinstance(outcome, dict)
    return folder, outcome


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_any_number_of_ranks_goes_on_from_a_checkpoint_of_two(
    tmp_path: Path, started: tuple[Path, dict[str, object]], world_size: int
) -> None:
    folder, expected = started
    found = resume(ALONE, folder) if world_size == 1 else run_ranks(tmp_path, world_size, resume, folder)[0]
    assert isinstance(found, dict)
    exact = world_size == 2
    torch.testing.assert_close(found["norms"], expected["norms"], rtol=0 if exact else 1e-4, atol=0)
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=0, atol=0 if exact else 1e-4)


def test_the_first_run_is_that_of_one_rank(tmp_path: Path, started: tuple[Path, dict[str, object]]) -> None:
    torch.testing.assert_close(start(ALONE, tmp_path)["weights"], started[1]["weights"], rtol=0, atol=1e-4)


def test_the_model_of_two_ranks_is_a_plain_hugging_face_folder(started: tuple[Path, dict[str, object]]) -> None:
    checkpoint = CheckpointStore(started[0]).load_latest()
    assert checkpoint is not None
    assert len(list(checkpoint.model_dir.glob("model-0000?-of-0000?.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint.model_dir, dtype=torch.float32)
    policy = SlicedPolicy(ALONE)
    policy.update(), policy.update()
    torch.testing.assert_close(dict(loaded.named_parameters()), policy.weights(), rtol=0, atol=1e-4, check_stride=False)


def test_every_rank_wrote_moments(started: tuple[Path, dict[str, object]]) -> None:
    checkpoint = CheckpointStore(started[0]).load_latest()
    assert checkpoint is not None
    sizes = [path.stat().st_size for path in sorted((checkpoint.folder / "optimizer").iterdir())]
    assert len(sizes) == 2
    assert max(sizes) < 1.3 * min(sizes)
