"""What a run was measured on, in words."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

_TIMEOUT_S = 20.0


def gpu_names() -> tuple[str, ...]:
    """The GPUs that NVIDIA's driver lists, by name."""
    if shutil.which("nvidia-smi") is None:
        return ()
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    listed = subprocess.run(query, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    return tuple(line.strip() for line in listed.stdout.splitlines() if line.strip()) if listed.returncode == 0 else ()


def describe_machine() -> str:
    """For example ``2 of 8 cores of AMD EPYC 7B13, 1 x NVIDIA H100, Linux 6.1, Python 3.11.7``."""
    usable, cores = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    parts = [f"{usable} of {cores} cores of {_cpu_name()}" if usable < cores else f"{cores} cores of {_cpu_name()}"]
    names = gpu_names()
    parts += [f"{names.count(name)} x {name}" for name in sorted(set(names))]
    return ", ".join([*parts, f"{platform.system()} {platform.release()}", f"Python {platform.python_version()}"])


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
