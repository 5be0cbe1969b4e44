"""The learner on a GPU: its tests, its kernels, its step; each in a process of its own, results written as they come.

    python -m benchmarks.gpu [--budget-s 330] [--folder benchmarks/results/gpu]

See docs/benchmarks.md. Sections that do not fit into the budget are cut off, and say so.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import typer

from benchmarks.gpu_plot import plot
from benchmarks.machine import ROOT, describe_machine

LEAST_S = 15.0
"""A section with less time than this is not started."""


@dataclass(frozen=True, slots=True)
class Section:
    """One command, its bound in seconds, and what its environment has besides."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    environment: Mapping[str, str] = field(default_factory=dict)


def sections(flash4: str | None) -> list[Section]:
    """In order of worth; ``flash4`` is a folder with the flash-attn-4 package, for the last ones alone."""
    python = (sys.executable, "-m")
    tests = (*python, "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark")
    with_flash4 = {"PYTHONPATH": os.pathsep.join([flash4 or "", os.environ.get("PYTHONPATH", "")])}
    step = (*python, "benchmarks.gpu_step")
    kept = [
        Section("tests", (*tests, "-k", "not fa4"), 110),
        Section("kernels", (*python, "benchmarks.gpu_kernels"), 60),
        Section("rivals", (*python, "benchmarks.gpu_kernels", "--rivals"), 45),
        Section("step_1.7b", (*step, "1.7b", "--variants", "compiled"), 110),
        Section("step_0.6b", (*step, "0.6b"), 150),
    ]
    if flash4 is not None:
        kept[1:1] = [
            Section("flash4_1.7b", (*step, "1.7b", "--variants", "compiled"), 110, with_flash4),
            Section("flash4_0.6b", (*step, "0.6b", "--variants", "compiled"), 90, with_flash4),
            Section("flash4_tests", (*tests, "-k", "fa4 and 128"), 45, with_flash4),
            Section("flash4_kernels", (*python, "benchmarks.gpu_kernels", "--attention"), 60, with_flash4),
        ]
    return kept


def run_section(section: Section, folder: Path, limit_s: float) -> dict[str, object]:
    """Run one section with its output in ``folder``; what it wrote as JSON by the time it ended, or was ended."""
    result_file = folder / f"{section.name}.part.json"
    environment = {**os.environ, **section.environment, "BENCH_OUT": str(result_file)}
    started = time.monotonic()
    with (folder / f"{section.name}.log").open("w") as log:
        process = subprocess.Popen(section.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            outcome = str(process.wait(limit_s))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            outcome = f"cut off after {limit_s:.0f} s"
    found = json.loads(result_file.read_text()) if result_file.exists() else {}
    tail = (folder / f"{section.name}.log").read_text().splitlines()[-1:]
    return {"exit": outcome, "seconds": round(time.monotonic() - started, 1), "last_line": tail, **found}


def main(
    budget_s: float = 330.0,
    folder: Path = ROOT / "benchmarks" / "results" / "gpu",
    flash4: str | None = None,
    only: str = "",
) -> None:
    """Run every section, or those whose name holds a part of ``only``; all lands in ``gpu.json`` and ``gpu.svg``."""
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + budget_s
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    results: dict[str, object] = {"machine": {**describe_machine(), "gpu": gpu}}
    wanted = [part for part in only.split(",") if part]
    for section in sections(flash4):
        left_s = deadline - time.monotonic()
        if (wanted and not any(part in section.name for part in wanted)) or left_s < LEAST_S:
            continue
        results[section.name] = run_section(section, folder, min(section.limit_s, left_s))
        (folder / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
        typer.echo(f"{section.name}: {json.dumps(results[section.name])[:1500]}")
    plot(results, folder / "gpu.svg")


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
