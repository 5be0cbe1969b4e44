"""What a number was measured on."""

import datetime
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]


def describe_machine() -> dict[str, str]:
    """Machine, software and commit, for the head of a result file."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers", "redis")},
    }


def _commit() -> str:
    if not (ROOT / ".git").exists():
        return "not a checkout"

    def output(*command: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=True
        ).stdout.strip()

    # Results are what a benchmark writes, not what it runs.
    changed = output("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return output("describe", "--always") + ("-dirty" if changed else "")


def _processor() -> str:
    models = {
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    }
    return ", ".join(sorted(models)) or platform.machine()
