"""Checkpoints of a tiny policy."""

from pathlib import Path

import torch

from lambdapo_async.config.learner import LearnerConfig
from lambdapo_async.journal.receipts import ReceiptsState
from lambdapo_async.replay.bias import BiasState
from lambdapo_async.replay.queue import ReplaySnapshot
from learner.checkpoint import CheckpointStore, LearnerState
from learner.policy import Policy
from learner.pool import PoolState

CONFIG = LearnerConfig(lr=1e-2, warmup_steps=5, weight_decay=0.1, max_grad_norm=0.5)


def load(folder: Path) -> Policy:
    return Policy.load(folder, revision=None, config=CONFIG, temperature=0.9, device=torch.device("cpu"))


def state(step: int) -> LearnerState:
    return LearnerState(
        step=step,
        version=step + 1,
        receipts=ReceiptsState(watermarks={"actor-1": 7, "b": 0}, next_index=99, holes=(4, 98)),
        pool=PoolState(
            taken=10 * step + 5,
            keep_from=10 * step + 1,
            totals={"trained": 3},
            replay=ReplaySnapshot(uses={10 * step + 2: 1}, last_number=10 * step + 2),
            bias=BiasState(dropped={"stale": {8: 1}}),
        ),
        open_rounds=(0, 5),
    )


def owner(folder: Path) -> CheckpointStore:
    store = CheckpointStore(folder)
    store.take_fence()
    return store


def steps_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*"))
