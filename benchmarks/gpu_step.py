"""The learner's whole step on a GPU by model, lengths and options: tokens/s, MFU, peak memory, and where time goes.

python -m benchmarks.gpu_step 0.6b [--variants compiled,eager] [--tiny]
"""

import gc
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import typer
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_results import Results, peak_bytes, spread, synchronize, timed
from benchmarks.lengths import GroupLengths, draw_groups
from benchmarks.model_shapes import SHAPES
from benchmarks.peers.worker import CONFIG
from benchmarks.workload import Workload, make_workload
from lambdapo_async.config import RunConfig, load_config
from lambdapo_async.packing import MicroBatch, pack
from learner.attention import register_attention
from learner.attention_kernels import Backend, sdpa_attention
from learner.flops import ModelFlops, peak_flops
from learner.policy import Policy
from learner.trainer import Trainer

GIB = 2**30
PACK = 8_192
STEP_TOKENS = 8 * PACK
TOP_KERNELS = 24


@dataclass(frozen=True, slots=True)
class Variant:
    """How a policy is loaded."""

    name: str
    options: tuple[str, ...] = ()
    """Settings of the learner's section."""
    attention: Backend | None = None
    """Instead of the best one."""


EAGER = Variant("eager")
COMPILED = Variant("compiled", ("learner.compile=true",))
CHECKPOINTED = Variant("eager, checkpointed", ("learner.activation_checkpointing=true",))
SDPA = Variant("eager, sdpa", attention=Backend("lambdapo_sdpa", sdpa_attention, softcap=False))
VARIANTS = {"compiled": COMPILED, "checkpointed": CHECKPOINTED, "eager": EAGER, "sdpa": SDPA}


def settings(variant: Variant, pack_tokens: int, device: torch.device) -> RunConfig:
    """The demo's objective; nothing is learned, so that every step does the same work."""
    overrides = [
        "learner.lr=1e-9",
        "learner.warmup_steps=0",
        f"learner.device={device.type}",
        f"learner.micro_batch_tokens={pack_tokens}",
        f"model.max_length={pack_tokens}",
        f"sampling.max_tokens={pack_tokens - 1}",
        *variant.options,
    ]
    return load_config(CONFIG, overrides, environ={})


def batches(pack_tokens: int, step_tokens: int, scale: int) -> dict[str, list[GroupLengths]]:
    """Reasoning lengths in groups of eight with shared prompts, and documents that fill a pack each."""
    whole = GroupLengths(8, (pack_tokens - 8,) * 2)
    return {
        "reasoning": draw_groups("reasoning", seed=0, num_tokens=step_tokens, group_size=8, scale=scale),
        "whole": [whole] * max(1, step_tokens // pack_tokens // 2),
    }


class Bench:
    """One policy and what is measured of it."""

    def __init__(self, results: Results, folder: Path, variant: Variant, device: torch.device, pack_tokens: int):
        self._results, self.variant, self._device, self.pack_tokens = results, variant, device, pack_tokens
        self.config = settings(variant, pack_tokens, device)
        self.policy = Policy.load(folder, revision=None, config=self.config.learner, temperature=1.0, device=device)
        if variant.attention is not None:
            self.policy._model.set_attn_implementation(register_attention(variant.attention))
        self._trainer = Trainer(self.policy, self.config)
        self._flops = ModelFlops.of(self.policy._model)

    def step(self, workload: Workload) -> None:
        self._trainer.step(workload.groups, version=0)

    def measure(self, name: str, workload: Workload, *, repeats: int) -> None:
        """Whole steps, from groups in memory to new weights."""
        key = f"{name} / {self.variant.name}"
        packed = pack(workload.sequences, token_budget=self.pack_tokens)
        flops = sum(self._flops.training(each) for each in packed)
        tokens = sum(len(each.input_ids_T) for each in packed)
        first = timed(lambda: self.step(workload), self._device, warm_up=0, repeats=1)
        peak = peak_bytes(lambda: self.step(workload), self._device)
        seconds = timed(lambda: self.step(workload), self._device, warm_up=0, repeats=repeats)
        ceiling = peak_flops(torch.cuda.get_device_name()) if self._device.type == "cuda" else None
        entry = {
            "micro_batches": len(packed),
            "packed_tokens": tokens,
            "fill": round(tokens / len(packed) / self.pack_tokens, 4),
            "tokens_per_s": spread([tokens / each for each in seconds]),
            "training_tokens_per_s": spread([workload.num_tokens / each for each in seconds]),
            "mfu": spread([flops / each / ceiling for each in seconds]) if ceiling else None,
            "step_ms": spread([1e3 * each for each in seconds]),
            "first_step_s": round(first[0], 2),
            "graphs": counters["stats"]["unique_graphs"],
            "step_gib": round(peak / GIB, 2),
            "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2) if ceiling else None,
        }
        self._results.add(key, entry)

    def trace(self, name: str, workload: Workload) -> None:
        """Kernels by time, share of the step in which one runs, and where the host waits for the device."""
        self._results.add(f"{name} / {self.variant.name} / waits", waits(lambda: self.step(workload)))
        started = timed(lambda: self.step(workload), self._device, warm_up=0, repeats=1)[0]
        watched = ProfilerActivity.CUDA if self._device.type == "cuda" else ProfilerActivity.CPU
        with profile(activities=[watched]) as trace:
            self.step(workload)
            synchronize(self._device)
        kernels = sorted(trace.key_averages(), key=lambda event: -event.self_device_time_total)
        busy = sum(event.self_device_time_total for event in kernels) / 1e6
        entry = {
            "busy": round(busy / started, 4),
            "kernels": [
                [event.key[:90], event.count, round(event.self_device_time_total / 1e3, 2)]
                for event in kernels[:TOP_KERNELS]
            ],
        }
        self._results.add(f"{name} / {self.variant.name} / trace, ms", entry)

    def parity(self, packed: MicroBatch, backends: Sequence[Backend]) -> None:
        """Mean and largest difference of log pi from the best kernel's."""
        model, batch = self.policy._model, packed.to(self._device)
        chosen, best = model.config._attn_implementation, self.policy.logprobs(batch)
        for backend in backends:
            model.set_attn_implementation(register_attention(backend))
            difference = (self.policy.logprobs(batch) - best).abs()[batch.loss_mask_T]
            entry = {"mean": float(difference.mean()), "max": float(difference.max())}
            self._results.add(f"log pi / {chosen} against {backend.name}", entry)
        model.set_attn_implementation(chosen)


def waits(work: object) -> dict[str, int]:
    """File and line -> times that the host waited for the device there."""
    if not torch.cuda.is_available():
        return {}
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()  # type: ignore[operator]
    torch.cuda.set_sync_debug_mode("default")
    places = Counter(f"{Path(each.filename).name}:{each.lineno}" for each in caught)
    return dict(places.most_common(20))


def main(shape: str, variants: str = ",".join(VARIANTS), tiny: bool = False) -> None:
    """The named variants, one after the other."""
    results, device = Results(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pack_tokens, step_tokens, scale, repeats = (256, 1024, 1, 1) if tiny else (PACK, STEP_TOKENS, 4, 4)
    model = SHAPES[shape]
    if tiny:
        model = replace(SHAPES["starter"], num_attention_heads=4)
    lengths = batches(pack_tokens, step_tokens, scale)
    if tiny:
        lengths["reasoning"] = draw_groups("arithmetic", seed=0, num_tokens=step_tokens, group_size=8, scale=1)
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary)
        with device:
            model.write(folder)
        for variant in map(VARIANTS.__getitem__, variants.split(",")):
            try:
                measure_variant(results, Bench(results, folder, variant, device, pack_tokens), lengths, repeats)
            except torch.OutOfMemoryError:
                results.add(f"{variant.name} / failed", "out of memory")
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def measure_variant(
    results: Results, bench: Bench, lengths: Mapping[str, Sequence[GroupLengths]], repeats: int
) -> None:
    """One variant on all lengths, with a trace where it tells most."""
    for name, groups in lengths.items():
        workload = make_workload(groups, bench.config, vocab_size=bench.policy.vocab_size)
        bench.measure(name, workload, repeats=repeats)
        if bench.variant is COMPILED or (bench.variant is EAGER and name == "reasoning"):
            bench.trace(name, workload)
        if bench.variant is EAGER and name == "reasoning" and SDPA.attention is not None:
            bench.parity(pack(workload.sequences, token_budget=bench.pack_tokens)[0], [SDPA.attention])


if __name__ == "__main__":
    typer.run(main)
