"""A micro-batch's forward and backward pass, loss and diagnostics are queued without waiting for the GPU."""

from pathlib import Path

import pytest
import torch

from lambdapo_async.config import RunConfig
from learner.policy import Policy
from learner.trainer import Trainer
from tests.random_groups import received_groups
from tests.tiny_models import VOCAB, tiny_model_folder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_micro_batch_waits_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig.model_validate(
        {
            "model": {"path": "unused", "max_length": 64},
            "task": {"kind": "arithmetic"},
            "sampling": {"max_tokens": 16},
            "rollout": {"group_size": 4, "groups_per_step": 4},
            "learner": {"micro_batch_tokens": 64},
        }
    )
    policy = Policy.load(
        tiny_model_folder(tmp_path),
        revision=None,
        config=config.learner,
        temperature=1.0,
        device=torch.device("cuda"),
    )
    trainer, own, num_batches = Trainer(policy, config), Trainer._backward, 0

    def watched(self: Trainer, *args: object) -> None:
        nonlocal num_batches
        num_batches += 1
        torch.cuda.set_sync_debug_mode("error")
        try:
            own(self, *args)  # type: ignore[arg-type]
        finally:
            torch.cuda.set_sync_debug_mode("default")

    # The first step compiles and tunes kernels, which may wait.
    trainer.step(received_groups(0, config, vocab=VOCAB, version=0), version=0)
    monkeypatch.setattr(Trainer, "_backward", watched)
    trainer.step(received_groups(1, config, vocab=VOCAB, version=1), version=1)
    assert num_batches > 1
