"""The picture of benchmarks/results/learner.json: speed and memory, one bar per peer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

LABELS = {
    "ours": "lambdapo-async",
    "trl": "TRL GRPO",
    "trl_stock": "TRL GRPO, C library's allocator",
    "trl_vllm": "TRL GRPO, from vLLM",
    "padded": "transformers, padded",
    "naive": "packed, all logits",
}
COLOURS = {
    "ours": "#1f6feb",
    "trl": "#d29922",
    "trl_stock": "#eac54f",
    "trl_vllm": "#9e6a03",
    "padded": "#8c959f",
    "naive": "#d0d7de",
}
WIDTH = 0.14


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Write the picture; the same result gives the same bytes."""
    mpl.rcParams["svg.hashsalt"] = "learner"
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    speed, memory, logits = figure.subplots(1, 3, width_ratios=[4, 4, 1.4])
    _bars(speed, result["distributions"], "tokens_per_s", "tokens/s")
    _bars(memory, result["distributions"], "step_mib", "MiB above idle, one step")
    _bars(logits, result["logits"], "step_mib", "MiB above idle")
    logits.set_xlabel(f"V = {result['wide_shape']['vocab_size']:,}", fontsize=8)
    speed.legend(fontsize=7, frameon=False)
    figure.suptitle(f"{result['shape']['name']} on {result['machine']['processor']}, {result['device']}", fontsize=9)
    figure.savefig(path, metadata={"Date": None})


def _bars(axes: Axes, batches: Mapping[str, Any], quantity: str, label: str) -> None:
    for position, batch in enumerate(batches.values()):
        for number, (peer, measured) in enumerate(batch["peers"].items()):
            if quantity in measured:
                _bar(axes, position + (number - 2.5) * WIDTH, peer, measured[quantity], labelled=position == 0)
    axes.set_xticks(range(len(batches)), list(batches), fontsize=8)
    axes.set_ylabel(label, fontsize=8)
    axes.tick_params(axis="y", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _bar(axes: Axes, at: float, peer: str, value: float | Mapping[str, float], *, labelled: bool) -> None:
    """A number, or a median with its range."""
    low, middle, high = (value, value, value) if isinstance(value, int | float) else tuple(value.values())
    label = LABELS[peer] if labelled else None
    error = [[middle - low], [high - middle]]
    axes.bar(at, middle, WIDTH, yerr=error, color=COLOURS[peer], label=label, error_kw={"lw": 0.8})
