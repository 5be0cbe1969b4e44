"""What publishing costs a training step: one learner, a real Redis, a new version after every update."""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.weights.updates import build_model, document_tokens, take_step
from lambdapo_async.broker.connection import embedded_server
from lambdapo_async.broker.redis_run import RedisRun
from learner.publisher import Publisher

BATCH, LENGTH = 16, 128
STEPS = 8
LR = 1e-6
FENCE = 1
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class StallResult:
    """Medians over the steps after the first two versions, which go out whole or wait for that."""

    tokens_per_step: int
    step_s: float
    """Forward, backward and update."""
    stall_s: float
    """In which the step waits: for the copy of the weights, and for the publish before it if that still runs."""
    stall_share: float
    publish_s: float
    """In the background, encoding included."""


class Snapshot:
    """``learner.publisher.Snapshottable``"""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def published(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._model.named_parameters():
            yield name, parameter.detach().bfloat16()


def measure_stall() -> StallResult:
    """Train and publish ``STEPS`` times at lr 1e-6; small steps, so the share is rather too large than too small."""
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    tokens, snapshot = document_tokens(), Snapshot(model)
    step_s, stall_s, publish_s = [], [], []
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(embedded_server(Path(stack.enter_context(tempfile.TemporaryDirectory()))))
        run = stack.enter_context(contextlib.closing(RedisRun(url, "stall", timeout_s=TIMEOUT_S)))
        run.run_store.create(b"{}", {}, fence=FENCE)
        publisher = stack.enter_context(contextlib.closing(Publisher(run.weights, run_id="stall", fence=FENCE)))
        for version in range(STEPS):
            started = time.monotonic()
            take_step(model, optimizer, tokens, batch=BATCH, length=LENGTH)
            stepped = time.monotonic()
            publisher.publish(version, snapshot, consumed=0)
            stall_s.append(time.monotonic() - stepped)
            step_s.append(stepped - started)
            report = publisher.take_report()
            publish_s.append(report.get("weights/encode_s", 0.0) + report.get("weights/publish_s", 0.0))
            print(f"step {version + 1} of {STEPS}: {step_s[-1]:.2f} s, stalled {1000 * stall_s[-1]:.1f} ms", flush=True)
    return StallResult(
        tokens_per_step=BATCH * LENGTH,
        step_s=median(step_s[2:]),
        stall_s=median(stall_s[2:]),
        stall_share=median(stall_s[2:]) / median(step_s[2:]),
        publish_s=median(publish_s[3:]),
    )
