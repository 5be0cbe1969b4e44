"""Weight files against what others send: bytes per parameter, speed, and seconds from publish to applied.

    python -m benchmarks.weights [--quick] [--largest]

All encodings run in one process, the codec on one thread, deliveries over a private Redis. The trained model is kept in
outputs/bench. ``--quick`` leaves out the large shape and the repeats, ``--largest`` adds one of 1.7B parameters, which
takes 15 GB of memory; the rest takes 11.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
import typer

from benchmarks.machine import ROOT, describe_machine
from benchmarks.model_shapes import QWEN3_06B, QWEN3_17B, ModelShape
from benchmarks.weights.codec import CodecResult, measure_codec
from benchmarks.weights.delivery import Delivery, DeliveryResult
from benchmarks.weights.plot import plot
from benchmarks.weights.stall import measure_stall
from benchmarks.weights.updates import num_parameters, shaped_update, trained_updates
from lambdapo_async.broker.connection import embedded_server
from lambdapo_async.weights.state import State

RESULT = ROOT / "benchmarks" / "results" / "weights.json"
CACHE = ROOT / "outputs" / "bench"
FOLLOWERS = (1, 4, 16)
COPIES, REPEATS, WARM_UP = 4, 3, 600
MEMORY_BYTES, LARGEST_MEMORY_BYTES = 8.5e9, 14e9
"""Of states, mirrors and payloads, without what passes: the machine may be somebody else's, too."""
PAUSE_TIMEOUT_S = 600.0


def main(quick: bool = False, largest: bool = False, output: Path = RESULT) -> None:
    started = time.monotonic()
    torch.set_num_threads(1)
    machine = describe_machine()
    updates = trained_updates(WARM_UP, CACHE)
    codec = [asdict(one) for one in codec_of_all(updates, quick=quick)]
    deliveries = [asdict(one) for one in deliver_all(updates[1e-6], shapes_of(quick=quick, largest=largest))]
    result: dict[str, object] = {
        "machine": machine,
        "codec": codec,
        "delivery": deliveries,
        "stall": asdict(measure_stall()),
        "pause": measure_pause(),
        "total_s": time.monotonic() - started,
    }
    output.write_text(json.dumps(result, indent=1) + "\n")
    plot(result, output.with_suffix(".svg"))
    print(f"{result['stall']}\n{result['pause']}\n{result['total_s']:.0f} s, written to {output}")


def shapes_of(*, quick: bool, largest: bool) -> Mapping[str, tuple[ModelShape, float]]:
    """Name -> shape and bytes of memory."""
    shapes = {} if quick else {"0.6b": (QWEN3_06B, MEMORY_BYTES)}
    return shapes | ({"1.7b": (QWEN3_17B, LARGEST_MEMORY_BYTES)} if largest else {})


def codec_of_all(updates: Mapping[float, tuple[State, State]], *, quick: bool) -> Iterator[CodecResult]:
    with ThreadPoolExecutor(1) as pool:
        for one in measure_codec(updates, copies=2 if quick else COPIES, repeats=1 if quick else REPEATS, pool=pool):
            print(
                f"lr {one.lr:g}  changed {one.changed_share:7.2%}  {one.encoding:32}"
                f"{one.bytes_per_parameter:8.4f} B/param {one.times_smaller:7.1f}x smaller"
                f"{one.encode_mb_per_s:8.0f} MB/s encode{one.decode_mb_per_s:8.0f} MB/s decode+apply",
                flush=True,
            )
            yield one


def deliver_all(
    trained: tuple[State, State], shapes: Mapping[str, tuple[ModelShape, float]]
) -> Iterator[DeliveryResult]:
    """14M as trained at lr 1e-6; larger ones to as many followers as there is memory for mirrors."""
    with tempfile.TemporaryDirectory() as folder, embedded_server(Path(folder)) as url, ThreadPoolExecutor(2) as pool:
        small = Delivery("14m", *trained, url=url, pool=pool)
        yield from printed(small, FOLLOWERS, memory=MEMORY_BYTES, repeats=REPEATS)
        for name, (shape, memory) in shapes.items():
            if 3 * num_bytes(shape) > min(memory, available_bytes()):
                print(f"{name}: left out, {available_bytes() / 1e9:.1f} GB are available")
            else:
                yield from deliver_shaped(name, shape, memory=memory, url=url, pool=pool)


def deliver_shaped(
    name: str, shape: ModelShape, *, memory: float, url: str, pool: Executor
) -> Iterator[DeliveryResult]:
    """A generator of its own, so that one shape's states are gone before the next one's are made."""
    delivery = Delivery(name, *shaped_update(shape), url=url, pool=pool)
    mirrors = int(memory / num_bytes(shape)) - 2  # both versions are there, too
    followers = [number for number in FOLLOWERS if number <= mirrors]
    yield from printed(delivery, followers, memory=memory - 2 * num_bytes(shape), repeats=1)


def printed(delivery: Delivery, followers: Sequence[int], *, memory: float, repeats: int) -> Iterator[DeliveryResult]:
    for number in followers:
        for one in delivery.measure(number, memory=memory, repeats=repeats):
            print(
                f"{one.shape:5} {one.encoding:32} {one.link:10} to {one.followers:2}: "
                f"{one.num_bytes / 1e6:8.1f} MB, all applied after {one.all_applied_s:7.2f} s",
                flush=True,
            )
            yield one


def num_bytes(shape: ModelShape) -> int:
    """Of one version in bfloat16."""
    return 2 * num_parameters(shape)


def measure_pause() -> Mapping[str, float]:
    """In a process of its own: vLLM wants its environment before anything is imported."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.weights.pause"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, timeout=PAUSE_TIMEOUT_S, check=True)
    seconds: Mapping[str, float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def available_bytes() -> int:
    """What the kernel could give us now."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


if __name__ == "__main__":
    typer.run(main)
