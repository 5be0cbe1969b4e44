"""What a section of the GPU benchmark measures, in a file that is complete after every entry."""

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


class Results:
    """Entries of one section; a process that is killed loses only the entry it was at."""

    def __init__(self) -> None:
        self._path = Path(os.environ.get("BENCH_OUT", os.devnull))
        self._entries: dict[str, object] = {}

    def add(self, name: str, value: object) -> None:
        """Write and print one entry."""
        self._entries[name] = value
        if self._path != Path(os.devnull):
            partial = self._path.with_suffix(".tmp")
            partial.write_text(json.dumps(self._entries, indent=1))
            partial.replace(self._path)
        print(name, json.dumps(value), flush=True)


def spread(values: Sequence[float]) -> dict[str, float]:
    """min, median and max, four digits."""
    spreads = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {name: float(f"{value:.4g}") for name, value in spreads.items()}


def synchronize(device: torch.device) -> None:
    """Wait for all that the device was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(work: Callable[[], object], device: torch.device, *, warm_up: int, repeats: int) -> list[float]:
    """Seconds of each repeat, device included."""
    seconds = []
    for _ in range(warm_up + repeats):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return seconds[warm_up:]


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Most that torch's allocator held at once during ``work``, above what it held before; 0 on a CPU."""
    if device.type != "cuda":
        work()
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
