"""One peer in a process of its own: load, warm up, time steps, read the peak of memory."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.lengths import GroupLengths
from benchmarks.machine import ROOT
from benchmarks.memory import memory_gauge
from benchmarks.model_shapes import ModelShape
from benchmarks.peers import PEERS, STOCK_ALLOCATOR
from benchmarks.peers.interface import Peer, Setting
from benchmarks.workload import Workload, make_workload
from lambdapo_async.config import RunConfig, load_config
from learner.host_memory import keep_freed_memory

CONFIG = ROOT / "configs" / "arithmetic_demo.toml"
WARM_UP = (GroupLengths(4, (4, 4)),)
"""Makes the optimizer's moments, which are no memory of a step."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What every peer of a comparison does."""

    shape: ModelShape
    model_dir: Path
    device: str
    num_threads: int
    micro_batch_tokens: int
    steps: int
    """Timed steps per batch."""
    batches: Mapping[str, Sequence[GroupLengths]]

    @property
    def config(self) -> RunConfig:
        """The demo's objective and optimizer; nothing is learned, so that weights and gradients stay equal."""
        overrides = [
            "learner.lr=1e-9",
            "learner.warmup_steps=0",
            f"learner.device={self.device}",
            f"learner.num_threads={self.num_threads}",
            f"learner.micro_batch_tokens={self.micro_batch_tokens}",
            f"model.max_length={self.micro_batch_tokens}",
            f"sampling.max_tokens={self.micro_batch_tokens - 1}",
        ]
        return load_config(CONFIG, overrides, environ={})

    def workload(self, lengths: Sequence[GroupLengths]) -> Workload:
        """Groups of these lengths for this model."""
        return make_workload(lengths, self.config, vocab_size=self.shape.vocab_size)


@dataclass(frozen=True, slots=True)
class Sample:
    """One peer's steps on one batch in one process."""

    seconds: tuple[float, ...]
    """Of each timed step; empty when the device's memory was too small."""
    processor_s: tuple[float, ...]
    """Processor time of each, all threads together."""
    peak_bytes: int
    idle_bytes: int
    """In use between steps: libraries (CPU), weights, optimizer."""
    num_slots: int
    grad_norm: float


def measure_peer(name: str, plan: Plan) -> dict[str, Sample]:
    """Batch name -> sample; runs in a process that ends afterwards."""
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(plan.num_threads)
    device = torch.device(plan.device)
    if plan.device == "cpu" and name not in STOCK_ALLOCATOR:
        keep_freed_memory()
    peer = PEERS[name](Setting(plan.model_dir, plan.config, device))
    peer.step(plan.workload(WARM_UP))
    workloads = {batch: plan.workload(lengths) for batch, lengths in plan.batches.items()}
    return {batch: _measure(peer, workload, plan.steps, device) for batch, workload in workloads.items()}


def _measure(peer: Peer, workload: Workload, steps: int, device: torch.device) -> Sample:
    gauge = memory_gauge(device)
    idle_bytes = gauge.restart()
    seconds: list[float] = []
    processor_s: list[float] = []
    grad_norm = float("nan")
    try:
        peer.step(workload)  # not timed: its memory comes from the kernel, which a run's later steps reuse
        for _ in range(steps):
            started, worked = time.perf_counter(), time.process_time()
            grad_norm = peer.step(workload)  # a number read back from the device, which has finished then
            seconds.append(time.perf_counter() - started)
            processor_s.append(time.process_time() - worked)
    except torch.OutOfMemoryError:
        seconds.clear()
        processor_s.clear()
    return Sample(tuple(seconds), tuple(processor_s), gauge.peak(), idle_bytes, peer.num_slots(workload), grad_norm)
