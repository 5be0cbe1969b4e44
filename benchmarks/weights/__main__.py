"""Weight files against what others send: bytes per parameter, speed, and seconds from publish to applied.

    python -m benchmarks.weights [--quick]

All encodings run in one process, the codec on one thread, deliveries over a private Redis. The trained model is kept in
outputs/bench; ``--quick`` leaves out the large shapes and the repeats.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
import typer

from benchmarks.machine import ROOT, describe_machine
from benchmarks.model_shapes import QWEN3_06B, QWEN3_17B
from benchmarks.weights.codec import measure_codec
from benchmarks.weights.delivery import Delivery, DeliveryResult
from benchmarks.weights.plot import plot
from benchmarks.weights.updates import num_parameters, shaped_update, trained_updates
from lambdapo_async.broker.connection import embedded_server
from lambdapo_async.weights.state import State

RESULT = ROOT / "benchmarks" / "results" / "weights.json"
CACHE = ROOT / "outputs" / "bench"
FOLLOWERS = (1, 4, 16)
SHAPES = {"0.6b": QWEN3_06B, "1.7b": QWEN3_17B}
COPIES, REPEATS, WARM_UP = 8, 3, 600
MEMORY_SHARE = 0.5
"""Of what is available: the machine may be somebody else's, too."""


def main(quick: bool = False, output: Path = RESULT) -> None:
    started = time.monotonic()
    torch.set_num_threads(1)
    updates = trained_updates(WARM_UP, CACHE)
    result: dict[str, object] = {"machine": describe_machine()}
    codec = []
    with ThreadPoolExecutor(1) as pool:
        for one in measure_codec(updates, copies=2 if quick else COPIES, repeats=1 if quick else REPEATS, pool=pool):
            print(
                f"lr {one.lr:g}  changed {one.changed_share:7.2%}  {one.encoding:32}"
                f"{one.bytes_per_parameter:8.4f} B/param {one.times_smaller:7.1f}x smaller"
                f"{one.encode_mb_per_s:8.0f} MB/s encode{one.decode_mb_per_s:8.0f} MB/s decode+apply"
            )
            codec.append(asdict(one))
    result["codec"] = codec
    deliveries = []
    for one_delivery in deliver_all(updates[1e-6], quick=quick):
        print(
            f"{one_delivery.shape:5} {one_delivery.encoding:32} {one_delivery.link:10} to {one_delivery.followers:2}: "
            f"{one_delivery.num_bytes / 1e6:8.1f} MB, all applied after {one_delivery.all_applied_s:7.2f} s"
        )
        deliveries.append(asdict(one_delivery))
    result["delivery"] = deliveries
    result["total_s"] = time.monotonic() - started
    output.write_text(json.dumps(result, indent=1) + "\n")
    plot(result, output.with_suffix(".svg"))
    print(f"{result['total_s']:.0f} s, written to {output}")


def deliver_all(trained: tuple[State, State], *, quick: bool) -> Iterator[DeliveryResult]:
    """14M as trained at lr 1e-6; larger ones with as many followers as memory holds mirrors."""
    with tempfile.TemporaryDirectory() as folder, embedded_server(Path(folder)) as url, ThreadPoolExecutor(2) as pool:
        yield from Delivery("14m", *trained, url=url, followers=max(FOLLOWERS), pool=pool).measure(
            FOLLOWERS, memory=available_bytes()
        )
        for name, shape in {} if quick else SHAPES.items():
            bytes_needed = 2 * num_parameters(shape)
            mirrors = int(MEMORY_SHARE * available_bytes() / bytes_needed) - 2  # both versions are there, too
            followers = tuple(number for number in FOLLOWERS if number <= mirrors)
            if not followers:
                print(f"{name}: left out, {available_bytes() / 1e9:.1f} GB are available")
                continue
            old, new = shaped_update(shape)
            delivery = Delivery(name, old, new, url=url, followers=max(followers), pool=pool)
            yield from delivery.measure(followers, memory=MEMORY_SHARE * available_bytes())


def available_bytes() -> int:
    """What the kernel could give us now."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


if __name__ == "__main__":
    typer.run(main)
