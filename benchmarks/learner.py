"""The learner's step against TRL's GRPO loss step, transformers' padded loop and naive logits, in one run.

    python -m benchmarks.learner [--device cpu] [--shape starter] [--rounds 3] [--steps 2]

Every peer takes the same optimizer step on the same groups, from groups in memory to new weights, with the same model,
loss and token budget; gradient norms that differ end the run. In every round each peer gets a process of its own, one
after the other. See docs/benchmarks.md.
"""

import json
import math
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
import typer

from benchmarks.attention import attention_tflops, available_backends
from benchmarks.learner_plot import plot
from benchmarks.lengths import DISTRIBUTIONS, GroupLengths, draw_groups
from benchmarks.machine import ROOT, describe_machine
from benchmarks.model_shapes import SHAPES, WIDE, ModelShape
from benchmarks.peers import PEERS, STOCK_ALLOCATOR
from benchmarks.peers.worker import Plan, Sample, measure_peer
from lambdapo_async.packing import fewest_micro_batches, pack
from learner.flops import utilisation

RESULT = ROOT / "benchmarks" / "results" / "learner.json"
WORKER_TIMEOUT_S = 600.0
GRADIENT_TOLERANCE = {"cpu": 1e-3, "cuda": 3e-2}
"""Relative difference of gradient norms that float32 and bfloat16 excuse."""
PACKED_MICRO_BATCHES = 64
"""Micro-batches' worth of tokens on which the fill of packing is measured."""
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large a device's batches are."""

    step_tokens: int
    micro_batch_tokens: int
    scale: int
    """Stretches lengths, see ``benchmarks.lengths``."""
    wide_tokens: int
    """Tokens under the vocabulary of 151,936."""


SIZES = {"cpu": Sizes(8_192, 2_048, 1, 2_048), "cuda": Sizes(131_072, 32_768, 8, 32_768)}
GROUP_SIZE = 8

Samples = dict[str, list[dict[str, Sample]]]
"""Peer -> one entry per round: batch -> sample."""


def compare(plan: Plan, peers: Sequence[str], rounds: int) -> Samples:
    """Round after round, every peer in a fresh process."""
    samples: Samples = {peer: [] for peer in peers}
    # A forked child cannot use CUDA; without it the fork server spares each child the imports.
    context = multiprocessing.get_context("spawn" if plan.device == "cuda" else "forkserver")
    context.set_forkserver_preload(["benchmarks.peers.worker", "trl.trainer.grpo_trainer"])
    for number in range(rounds):
        for peer in peers:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                samples[peer].append(pool.submit(measure_peer, peer, plan).result(WORKER_TIMEOUT_S))
            typer.echo(f"round {number + 1}/{rounds} {peer}: {_speeds(samples[peer][-1], plan)}", err=True)
    return samples


def _speeds(measured: Mapping[str, Sample], plan: Plan) -> str:
    return "  ".join(
        f"{batch} {_num_tokens(plan.batches[batch]) / statistics.median(sample.seconds):,.0f} tokens/s"
        if sample.seconds
        else f"{batch} out of memory"
        for batch, sample in measured.items()
    )


def _num_tokens(groups: Sequence[GroupLengths]) -> int:
    return sum(group.num_tokens for group in groups)


def summarise(samples: Samples, plan: Plan) -> dict[str, object]:
    """Batch -> what it is made of, what each peer reached, and ours divided by each of the others."""
    return {batch: _summarise_batch(batch, samples, plan) for batch in plan.batches}


def _summarise_batch(batch: str, samples: Samples, plan: Plan) -> dict[str, object]:
    groups = plan.batches[batch]
    by_peer = {peer: [measured[batch] for measured in rounds] for peer, rounds in samples.items()}
    _require_same_gradient(batch, by_peer, GRADIENT_TOLERANCE[plan.device])
    speeds = {
        peer: [_num_tokens(groups) / seconds for one in rounds for seconds in one.seconds]
        for peer, rounds in by_peer.items()
    }
    processor_s = {peer: [seconds for one in rounds for seconds in one.processor_s] for peer, rounds in by_peer.items()}
    others = [peer for peer in by_peer if peer != "ours" and speeds[peer]]
    summary: dict[str, object] = {
        "sequences": sum(len(group.completions) for group in groups),
        "tokens": _num_tokens(groups),
        "longest": max(group.prompt + max(group.completions) for group in groups),
        "peers": {peer: _summarise_peer(rounds, speeds[peer], groups, plan) for peer, rounds in by_peer.items()},
        "ours / peer": {peer: _ratios(speeds["ours"], speeds[peer]) for peer in others},
    }
    if plan.device == "cpu":
        ratios = {peer: _ratios(processor_s[peer], processor_s["ours"]) for peer in others}
        summary["ours / peer in processor time"] = ratios
    return summary


def _ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Of the steps at the same place in their rounds."""
    return spread([one / other for one, other in zip(above, below, strict=True)])


def _summarise_peer(
    rounds: Sequence[Sample], speeds: Sequence[float], groups: Sequence[GroupLengths], plan: Plan
) -> dict[str, object]:
    peak = max(rounds, key=lambda one: one.peak_bytes - one.idle_bytes)
    speed: dict[str, object] = {"tokens_per_s": spread(speeds)} if speeds else {"out_of_memory": True}
    return {
        **speed,
        "mfu": mfu(plan, groups, statistics.median(speeds)) if speeds else None,
        "peak_mib": round(peak.peak_bytes / MIB),
        "step_mib": round((peak.peak_bytes - peak.idle_bytes) / MIB),
        "padding": round(1 - _num_tokens(groups) / peak.num_slots, 4),
    }


def _require_same_gradient(batch: str, by_peer: Mapping[str, Sequence[Sample]], tolerance: float) -> None:
    """Numbers of peers that do different things are worth nothing."""
    norms = {peer: one.grad_norm for peer, rounds in by_peer.items() for one in rounds if one.seconds}
    ours = norms["ours"]
    if any(not math.isclose(norm, ours, rel_tol=tolerance) for norm in norms.values()):
        sys.exit(f"{batch}: the peers' gradients differ, so their speeds cannot be compared: norms {norms}")


def mfu(plan: Plan, groups: Sequence[GroupLengths], tokens_per_s: float) -> float | None:
    """Share of the GPU's peak that goes into what the step needs (learner.flops); None on other devices."""
    model_flops = plan.shape.flops()
    packed = pack(plan.workload(groups).sequences, token_budget=plan.micro_batch_tokens)
    flops = sum(model_flops.training(micro_batch) for micro_batch in packed)
    return utilisation(flops, _num_tokens(groups) / tokens_per_s, torch.device(plan.device))


def packing_fill(plan: Plan, scale: int) -> dict[str, dict[str, float]]:
    """Distribution -> share of the micro-batches' budgets that holds tokens, and how few of them there could be."""
    fill = {}
    for name in DISTRIBUTIONS:
        tokens = PACKED_MICRO_BATCHES * plan.micro_batch_tokens
        groups = draw_groups(name, seed=1, num_tokens=tokens, group_size=GROUP_SIZE, scale=scale)
        sequences = plan.workload(groups).sequences
        packed = pack(sequences, token_budget=plan.micro_batch_tokens)
        held = sum(len(each.input_ids_T) for each in packed)
        fill[name] = {
            "fill": round(held / (len(packed) * plan.micro_batch_tokens), 4),
            "micro_batches": len(packed),
            "no_fewer_than": fewest_micro_batches(sequences, token_budget=plan.micro_batch_tokens),
        }
    return fill


def attention_backends(plan: Plan) -> dict[str, dict[str, dict[str, float]]]:
    """Distribution -> kernel -> 10^12 FLOP/s on the first micro-batch; nothing on a CPU, which has one kernel."""
    if plan.device != "cuda":
        return {}
    first = {
        batch: pack(plan.workload(groups).sequences, token_budget=plan.micro_batch_tokens)[0]
        for batch, groups in plan.batches.items()
    }
    return {
        batch: {
            backend.name: spread(attention_tflops(backend, packed.layout, plan.shape))
            for backend in available_backends()
        }
        for batch, packed in first.items()
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """min, median and max, four digits."""
    spreads = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {name: float(f"{value:.4g}") for name, value in spreads.items()}


def measure(device: Literal["cpu", "cuda"], shape: str, rounds: int, steps: int, threads: int) -> dict[str, object]:
    """Everything of one run, ready for JSON."""
    sizes = SIZES[device]
    batches = {
        name: draw_groups(name, seed=0, num_tokens=sizes.step_tokens, group_size=GROUP_SIZE, scale=sizes.scale)
        for name in DISTRIBUTIONS
    }
    # One micro-batch of eight documents, nearly all of whose tokens need the output layer.
    wide = {"vocabulary": [GroupLengths(8, (sizes.wide_tokens // GROUP_SIZE - 8,) * GROUP_SIZE)]}
    peers = [peer for peer in PEERS if not peer.startswith("trl") or find_spec("trl") is not None]
    if device != "cpu":
        peers = [peer for peer in peers if peer not in STOCK_ALLOCATOR]
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary)
        plan = _plan(SHAPES[shape], folder / "model", device, threads, sizes.micro_batch_tokens, steps, batches)
        wide_plan = _plan(WIDE[device], folder / "wide", device, threads, sizes.wide_tokens, 1, wide)
        return {
            "shape": {"name": shape, **asdict(plan.shape)},
            "wide_shape": asdict(wide_plan.shape),
            "micro_batch_tokens": sizes.micro_batch_tokens,
            "steps_per_batch": rounds * steps,
            "trl": version("trl") if "trl" in peers else "absent: pip install trl==1.16.0",
            "distributions": summarise(compare(plan, peers, rounds), plan),
            "logits": summarise(compare(wide_plan, peers, 1), wide_plan),
            "packing_fill": packing_fill(plan, sizes.scale),
            "attention_tflops": attention_backends(plan),
        }


def _plan(
    shape: ModelShape,
    folder: Path,
    device: str,
    threads: int,
    micro_batch_tokens: int,
    steps: int,
    batches: Mapping[str, Sequence[GroupLengths]],
) -> Plan:
    shape.write(folder)
    return Plan(shape, folder, device, threads, micro_batch_tokens, steps, batches)


def main(
    device: Literal["cpu", "cuda"] = "cpu",
    shape: str = "starter",
    rounds: int = 3,
    steps: int = 2,
    threads: int = 1,
    output: Path = RESULT,
) -> None:
    """Measure, print, and write the result with machine and commit, and a plot beside it."""
    if find_spec("trl") is None:
        typer.echo("TRL is not installed, so it is not measured: pip install trl==1.16.0", err=True)
    result: dict[str, object] = {"machine": describe_machine(), "device": device, "threads": threads}
    result |= measure(device, shape, rounds, steps, threads)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    plot(result, output.with_suffix(".svg"))
    typer.echo(json.dumps(result, indent=1))


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
