"""Peak memory of this process on one device."""

import ctypes
import re
from pathlib import Path
from typing import Protocol

import torch

PROCESS = Path("/proc/self")


class MemoryGauge(Protocol):
    """Everything in bytes."""

    def restart(self) -> int:
        """Forget the peak; returns what is in use now."""

    def peak(self) -> int:
        """Most in use at once since :meth:`restart`."""


class ResidentMemory:
    """Linux: pages of the process in RAM, libraries included."""

    def restart(self) -> int:
        """Give what the allocator keeps back first, so that the next peak is not hidden in it."""
        ctypes.CDLL(None).malloc_trim(0)
        (PROCESS / "clear_refs").write_text("5")  # proc(5): resets VmHWM
        return _status("VmRSS")

    def peak(self) -> int:
        """The high-water mark."""
        return _status("VmHWM")


class CudaMemory:
    """What torch allocated on the current GPU."""

    def restart(self) -> int:
        """The cache goes back to the driver, too."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        """torch's own count."""
        return torch.cuda.max_memory_allocated()


def memory_gauge(device: torch.device) -> MemoryGauge:
    """The gauge of a device."""
    return CudaMemory() if device.type == "cuda" else ResidentMemory()


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", (PROCESS / "status").read_text())
    if found is None:
        raise OSError(f"/proc/self/status has no {name}: this gauge needs Linux")
    return int(found[1]) * 1024
