"""What a benchmark asks of every way to take a step."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from benchmarks.workload import Workload
from lambdapo_async.config import RunConfig


@dataclass(frozen=True, slots=True)
class Setting:
    """What all peers are given alike."""

    model_dir: Path
    """Weights in Hugging Face's format; every peer trains float32 masters of them."""
    config: RunConfig
    device: torch.device


class Peer(Protocol):
    """Holds a model and its optimizer."""

    def step(self, workload: Workload) -> float:
        """Groups in memory -> updated weights; returns the gradient norm before clipping."""

    def num_slots(self, workload: Workload) -> int:
        """Positions that the layers compute for ``workload``, padding included and a shared prompt once."""
