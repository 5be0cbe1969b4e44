"""The learner's policy and trainer without the maths: weights that say which groups they were trained on.

Everything about delivery is the product's own; what a step does to the policy is that it remembers the step. The
published tensors spell the history's digest, so that two sets of weights are equal exactly if their histories are.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lambdapo_async.config import RunConfig
from lambdapo_async.fleet_health import FreshTokens
from lambdapo_async.packing import MicroBatch
from learner.arrivals import ReceivedGroup
from learner.character_tokenizer import CHARACTERS
from learner.trainer import StepResult
from tests.chaos.ledger import Group, Ledger, Step, digest

VOCAB = 3 + len(CHARACTERS)
_HISTORY = "history.json"
_BALLAST = 512
"""Elements that never change, so that most versions go out as differences."""


def logit_table() -> np.ndarray:
    """[V, V] float64 logits of the next token after the row's: engine and learner's canary share them."""
    return np.random.default_rng(0).normal(0.0, 1.0, (VOCAB, VOCAB))


def weights_of(history: Sequence[Step]) -> Tensor:
    """[32] bfloat16: the bytes of the history's digest, each a whole number that bfloat16 holds exactly."""
    return torch.tensor(list(bytes.fromhex(digest(history))), dtype=torch.bfloat16)


def name_of_weights(weights: Tensor) -> str:
    """Inverse of :func:`weights_of`, as hex."""
    return bytes(int(value) for value in weights.float()).hex()


class CountingPolicy:
    """What the learner uses of ``learner.policy.Policy``."""

    def __init__(self, history: Sequence[Step], model_files: Mapping[str, bytes]) -> None:
        self.history = list(history)
        self.model_files = model_files
        self.device = torch.device("cpu")
        self.num_flops = 0.0
        self.num_updates, self.num_skipped = len(self.history), 0
        self.num_parameters, self.vocab_size, self.max_positions, self.lr = 32, VOCAB, 4096, 1.0
        self._log_table: Tensor | None = None

    @classmethod
    def load(cls, folder: Path, model_files: Mapping[str, bytes]) -> "CountingPolicy":
        return cls(read_history(folder), model_files)

    def published(self) -> Iterator[tuple[str, Tensor]]:
        yield "ballast", torch.arange(_BALLAST).remainder(128).to(torch.bfloat16)
        yield "digest", weights_of(self.history)

    def save_model(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _HISTORY).write_text(dump_history(self.history))
        for name, content in self.model_files.items():
            (folder / name).write_bytes(content)

    def optimizer_state(self) -> dict[str, Tensor]:
        return {}

    def named_masters(self) -> Iterator[tuple[str, Tensor]]:
        return iter(())

    def load_optimizer_state(self, moments: Mapping[str, Tensor], *, num_updates: int, num_skipped: int) -> None:
        assert not moments
        assert num_updates == len(self.history), "state and weights of a checkpoint are of one moment"
        self.num_updates, self.num_skipped = num_updates, num_skipped

    def logprobs(self, micro_batch: MicroBatch, *, temperature: float | None = None) -> Tensor:
        if self._log_table is None:
            self._log_table = torch.tensor(logit_table()).log_softmax(dim=1)
        ids_T = micro_batch.input_ids_T
        return self._log_table[ids_T[micro_batch.predictor_T], ids_T].float() * micro_batch.loss_mask_T


class CountingTrainer:
    """What the learner uses of ``learner.trainer.Trainer``."""

    def __init__(self, policy: CountingPolicy, config: RunConfig, ledger: Ledger) -> None:
        self._policy, self._ledger = policy, ledger

    def step(self, groups: Sequence[ReceivedGroup], *, version: int) -> StepResult:
        trained = tuple(
            Group(of.producer, of.seq, of.lease.index, received.group.min_version)
            for received in groups
            for of in [received.descriptor]
        )
        self._policy.history.append(Step(version, trained))
        self._policy.num_updates += 1
        self._ledger.write(
            "used", step=len(self._policy.history), version=version, indices=[group.index for group in trained]
        )
        metrics = {"loss/policy": 0.0, "optim/grad_norm": 0.0, "optim/lr": 1.0, "optim/skipped": 0.0}
        return StepResult(metrics, tuple(FreshTokens(1, 0.0, 0.0) for _ in groups))


def dump_history(history: Sequence[Step]) -> str:
    return json.dumps([[s.version, [[g.producer, g.seq, g.index, g.min_version] for g in s.groups]] for s in history])


def read_history(model_folder: Path) -> list[Step]:
    """What the policy of a checkpoint was trained on."""
    steps = json.loads((model_folder / _HISTORY).read_text())
    return [Step(version, tuple(Group(*group) for group in groups)) for version, groups in steps]
