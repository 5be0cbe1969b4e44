"""The picture of benchmarks/results/weights.json: bytes per parameter, and seconds from publish to applied."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.weights.encodings import OURS

LINKS = ("loopback", "1 Gbit/s", "100 Mbit/s")
GREYS = ("#d29922", "#bf8700", "#8c959f", "#6e7781", "#d0d7de")


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Write the picture; the same result gives the same bytes."""
    mpl.rcParams["svg.hashsalt"] = "weights"
    names = list(dict.fromkeys(one["encoding"] for one in result["codec"]))
    colours = dict(zip(names, ("#1f6feb", *GREYS), strict=False))
    shapes = list(dict.fromkeys(one["shape"] for one in result["delivery"]))
    figure = Figure(figsize=(4 * (1 + len(shapes)), 3.6), layout="constrained")
    size, *deliveries = figure.subplots(1, 1 + len(shapes))
    for name in names:
        points = [
            (one["changed_share"], one["bytes_per_parameter"]) for one in result["codec"] if one["encoding"] == name
        ]
        size.plot(*zip(*sorted(points), strict=True), "o-", ms=3, lw=1, color=colours[name], label=name)
    size.set(xscale="log", yscale="log", xlabel="changed elements per element", ylabel="bytes per parameter")
    shares = sorted({one["changed_share"] for one in result["codec"]})
    size.set_xticks(shares, [f"{share:.1%}" for share in shares], fontsize=7)
    size.minorticks_off()
    for axes, shape in zip(deliveries, shapes, strict=True):
        _delivery(axes, [one for one in result["delivery"] if one["shape"] == shape], shape, colours)
    size.legend(fontsize=6, frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.suptitle(f"{result['machine']['processor']}, {result['machine']['cores']} cores", fontsize=9)
    figure.savefig(path, metadata={"Date": None})


def _delivery(axes: Axes, results: list[Mapping[str, Any]], shape: str, colours: Mapping[str, str]) -> None:
    """All that reached the most followers that ours was measured with."""
    followers = max(one["followers"] for one in results if one["encoding"] == OURS)
    for number, (name, colour) in enumerate(colours.items()):
        found = {one["link"]: one["all_applied_s"] for one in results if one["encoding"] == name}
        of_all = {
            one["link"]: one["all_applied_s"]
            for one in results
            if (one["encoding"], one["followers"]) == (name, followers)
        }
        seconds = of_all or found
        at = [LINKS.index(link) + (number - 2.5) * 0.14 for link in seconds]
        axes.bar(at, list(seconds.values()), 0.14, color=colour, hatch=None if of_all else "//")
    axes.set_xticks(range(len(LINKS)), LINKS, fontsize=8)
    axes.set(yscale="log", ylabel="seconds from publish to applied")
    axes.set_title(f"{shape}, {followers} followers (hatched: fewer)", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
