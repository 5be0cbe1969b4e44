"""The picture of a GPU's results: MFU of whole steps, and attention by kernel.

python -m benchmarks.gpu_plot [benchmarks/results/gpu.json]
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.machine import ROOT

GOAL = 0.45
"""MFU that the learner is to reach."""
COLOURS = {"flash4": "#1f6feb", "varlen": "#d29922", "sdpa": "#8c959f"}
BAR = 0.25

Spread = Mapping[str, float]
"""min, median and max."""


def step_mfu(result: Mapping[str, Any]) -> dict[str, Spread]:
    """``model / lengths / layers`` -> MFU; of several runs the last that has it."""
    return {
        f"{section.removeprefix('step_').replace('flash4_', 'flash-attn 4, ')} / {name}": entry["mfu"]
        for section, name, entry in _entries(result)
        if entry.get("mfu")
    }


def attention_tflops(result: Mapping[str, Any]) -> dict[str, dict[str, Spread]]:
    """Segments -> kernel -> 10^12 FLOP/s; of several runs the last that has it."""
    found: dict[str, dict[str, Spread]] = {}
    for _, name, entry in _entries(result):
        if name.startswith("attention / "):
            _, segments, backend = name.split(" / ")
            found.setdefault(segments, {})[backend.removeprefix("lambdapo_")] = entry["tflops"]
    return found


def _entries(result: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Section, name and content of every measurement: of ``benchmarks.gpu``, or of several runs in one file."""
    for run in result.get("runs", [{"sections": result}]):
        for section, entries in run["sections"].items():
            if isinstance(entries, dict):
                yield from ((section, name, entry) for name, entry in entries.items() if isinstance(entry, dict))


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Write the picture; the same result gives the same bytes."""
    mpl.rcParams["svg.hashsalt"] = "gpu"
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    steps, attention = figure.subplots(1, 2, width_ratios=[3, 2])
    _plot_steps(steps, step_mfu(result))
    _plot_attention(attention, attention_tflops(result))
    figure.suptitle(result["machine"]["gpu"], fontsize=9)
    figure.savefig(path, metadata={"Date": None})


def _plot_steps(axes: Axes, mfu: Mapping[str, Spread]) -> None:
    for position, name in enumerate(sorted(mfu, key=lambda each: mfu[each]["median"])):
        middle, error = _with_error(mfu[name])
        colour = COLOURS["flash4"] if "compiled" in name else COLOURS["sdpa"]
        axes.barh(position, middle, xerr=error, color=colour, error_kw={"lw": 0.8})
        axes.text(0.004, position, name, va="center", fontsize=7)
    axes.axvline(GOAL, color="black", lw=0.8, ls="--")
    axes.text(GOAL, -0.4, "goal ", fontsize=7, ha="right")
    axes.set_xlabel("MFU of the whole step", fontsize=8)
    axes.set_yticks([])
    _tidy(axes)


def _plot_attention(axes: Axes, tflops: Mapping[str, Mapping[str, Spread]]) -> None:
    for position, backends in enumerate(tflops.values()):
        for number, (backend, colour) in enumerate(COLOURS.items()):
            if backend in backends:
                middle, error = _with_error(backends[backend])
                label = backend if position == 0 else None
                place = position + (number - 1) * BAR
                axes.bar(place, middle, BAR, yerr=error, color=colour, label=label, error_kw={"lw": 0.8})
    axes.set_xticks(range(len(tflops)), list(tflops), fontsize=8)
    axes.set_ylabel("attention, 10^12 FLOP/s", fontsize=8)
    if tflops:
        axes.legend(fontsize=7, frameon=False)
    _tidy(axes)


def _with_error(spread: Spread) -> tuple[float, Sequence[Sequence[float]]]:
    low, middle, high = spread["min"], spread["median"], spread["max"]
    return middle, [[middle - low], [high - middle]]


def _tidy(axes: Axes) -> None:
    axes.tick_params(axis="both", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def main(source: Annotated[Path, typer.Argument()] = ROOT / "benchmarks" / "results" / "gpu.json") -> None:
    """Draw a file of ``benchmarks.gpu`` into the SVG beside it."""
    plot(json.loads(source.read_text()), source.with_suffix(".svg"))


if __name__ == "__main__":
    typer.run(main)
