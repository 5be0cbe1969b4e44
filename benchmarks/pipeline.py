"""Actor alone, learner alone, and both together, on the demo's model and task, in one run.

    python -m benchmarks.pipeline [--steps 30] [--repeats 3]

The actor alone streams to a consumer that only reads and opens the gate. The learner alone reads groups recorded from
that actor, offered as fast as it takes them. The pipeline is the two of them, pinned to one core each; so are they when
alone. Redis and this process share the learner's core, always. Groups with equal rewards are kept, so that a completion
sampled is a completion trained on.
"""

import json
import os
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import msgpack
import numpy as np
import typer

from benchmarks.consumer import Consumer
from benchmarks.machine import ROOT, describe_machine
from benchmarks.processes import Running, process, wait_for
from lambdapo_async.broker.connection import embedded_server
from lambdapo_async.broker.interface import Delivery, Descriptor, EnqueueStatus
from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.config import RunConfig, load_config
from lambdapo_async.errors import RunNotFoundError
from lambdapo_async.metrics import STEP, read_metrics
from lambdapo_async.tasks.registry import build_task
from learner.starter import ensure_starter

CONFIG = ROOT / "configs" / "arithmetic_demo.toml"
RESULT = ROOT / "benchmarks" / "results" / "pipeline.json"
LEARNER_CORE, ACTOR_CORE = 0, 1
TIMEOUT_S = 60.0
WARM_UP_STEPS = 5


@dataclass(frozen=True)
class Rates:
    """What one configuration reached in one repeat."""

    completions_per_s: float
    tokens_per_s: float
    learner_idle_share: float = 1.0
    actor_idle_share: float = 1.0
    staleness_mean: float = 0.0
    actor_cpu_ms: float = 0.0
    """Processor milliseconds of the actor's processes per completion."""
    learner_cpu_ms: float = 0.0
    actor_core_share: float = 0.0
    """Of the time, how much the actor's processes had a core."""
    learner_core_share: float = 0.0


def bench_overrides(steps: int, output_dir: Path, url: str) -> list[str]:
    return [
        "rollout.filter_zero_variance=false",
        "evaluation.every_steps=0",
        f"learner.num_steps={steps + WARM_UP_STEPS}",
        f"learner.checkpoint_every={steps + WARM_UP_STEPS}",
        "learner.num_threads=1",
        "learner.lr=1e-7",  # speed is measured, not learning: completions must not change length on the way
        f"output_dir={output_dir}",
        f"broker.url={url}",
    ]


def actor_alone(config: RunConfig, model_dir: Path, folder: Path, steps: int) -> tuple[Rates, list[Delivery]]:
    run_id = f"actor-{uuid.uuid4().hex[:8]}"
    consumer = Consumer(config, run_id, model_dir)
    log = folder / "actor_alone.log"
    with process(ACTOR_CORE, log, "actors", "--redis-url", config.broker.url, "--run-id", run_id) as actor:
        warm_up = consumer.read(WARM_UP_STEPS * config.rollout.groups_per_step, actor)
        started, before = time.time(), consumer.run.fleet.members()[0]
        deliveries = consumer.read(steps * config.rollout.groups_per_step, actor)
        ended, after = time.time(), consumer.run.fleet.members()[0]
        actor.wait_sampled()
    completions, elapsed = len(deliveries) * config.rollout.group_size, ended - started
    cpu_s = actor.cpu_s(started, ended)
    rates = Rates(
        completions_per_s=completions / elapsed,
        tokens_per_s=(after.tokens - before.tokens) / (after.completions - before.completions) * completions / elapsed,
        actor_idle_share=after.idle_share,
        actor_cpu_ms=1000 * cpu_s / completions,
        actor_core_share=cpu_s / elapsed,
    )
    return rates, warm_up + deliveries


Feed = Callable[[str, Running], Running | None]
"""Serves a run until its learner has ended; returns the actor, if there was a real one."""


def learner_run(config: RunConfig, overrides: Sequence[str], folder: Path, name: str, feed: Feed) -> Rates:
    """One learner process on its core, fed by ``feed``, until its last step."""
    run_id = f"{name}-{uuid.uuid4().hex[:8]}"
    log = folder / f"{name}.log"
    settings = [part for override in overrides for part in ("--set", override)]
    with process(LEARNER_CORE, log, "learner", str(CONFIG), "--run-id", run_id, *settings) as learner:
        actor = feed(run_id, learner)
        wait_for(lambda: learner.has_ended, learner, timeout_s=600)
    return rates_of(config.output_dir / run_id / "metrics.jsonl", config, learner, actor)


def rates_of(metrics: Path, config: RunConfig, learner: Running, actor: Running | None) -> Rates:
    """Steady state: all steps but the first ones."""
    rows = [row for row in read_metrics(metrics) if row.kind == STEP][WARM_UP_STEPS:]
    per_step = config.rollout.groups_per_step * config.rollout.group_size
    started, ended = rows[0].time, rows[-1].time
    elapsed, completions = ended - started, per_step * (len(rows) - 1)
    learner_s, actor_s = learner.cpu_s(started, ended), 0.0 if actor is None else actor.cpu_s(started, ended)

    def mean(name: str) -> float:
        return statistics.fmean(row.values[name] for row in rows[1:])

    return Rates(
        completions_per_s=completions / elapsed,
        tokens_per_s=sum(row.values["tokens/trained"] for row in rows[1:]) / elapsed,
        learner_idle_share=mean("time/wait_s") * (len(rows) - 1) / elapsed,
        actor_idle_share=1.0 if actor is None else mean("actors/idle_share"),
        staleness_mean=mean("staleness/mean"),
        actor_cpu_ms=1000 * actor_s / completions,
        learner_cpu_ms=1000 * learner_s / completions,
        actor_core_share=actor_s / elapsed,
        learner_core_share=learner_s / elapsed,
    )


def offer_recorded(recorded: Sequence[Delivery], config: RunConfig) -> Feed:
    def feed(run_id: str, learner: Running) -> None:
        """Offer the recorded groups over and over, ahead of the learner by as much as the gate would allow."""
        run = RedisRun(config.broker.url, run_id, timeout_s=TIMEOUT_S)
        wait_for(lambda: is_running(run), learner)
        admission, sink, epoch = run.admission("feeder"), run.sink(), run.run_store.state().epoch
        seq = 0
        while not learner.has_ended:
            leases = admission.lease(config.rollout.groups_per_step)
            for lease in leases:
                seq += 1
                payload = answered_now(recorded[seq % len(recorded)].payload, lease.id, run.weights.head())
                descriptor = Descriptor("feeder", seq, lease, 0, len(payload), 0.5)
                reply = sink.enqueue([Delivery(descriptor, payload)], epoch=epoch)
                if reply.status is not EnqueueStatus.OK:
                    sys.exit(f"the queue answered {reply}; the learner's log:\n{learner.log.read_text()[-3000:]}")
            if not leases:
                time.sleep(0.005)

    return feed


def answered_now(payload: bytes, lease_id: str, version: int) -> bytes:
    """The recorded message as an answer to another lease, sampled under another version."""
    message = msgpack.unpackb(payload)
    versions = np.full(len(message["span_versions"]) // 8, version, "<i8").tobytes()
    return msgpack.packb({**message, "lease": lease_id, "span_versions": versions})


def is_running(run: RedisRun) -> bool:
    try:
        return run.run_store.state().phase == "running"
    except RunNotFoundError:
        return False


def real_actor(config: RunConfig, folder: Path) -> Feed:
    def feed(run_id: str, learner: Running) -> Running:
        run = RedisRun(config.broker.url, run_id, timeout_s=TIMEOUT_S)
        wait_for(lambda: is_running(run), learner)
        log = folder / "pipeline_actor.log"
        with process(ACTOR_CORE, log, "actors", "--redis-url", config.broker.url, "--run-id", run_id) as actor:
            wait_for(lambda: learner.has_ended, learner, actor, timeout_s=900)
        return actor

    return feed


def measure(steps: int, repeats: int) -> dict[str, list[Rates]]:
    os.sched_setaffinity(0, {LEARNER_CORE})  # inherited by Redis
    results: dict[str, list[Rates]] = {"actor alone": [], "learner alone": [], "pipeline": []}
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary, embedded_server(Path(temporary)) as url:
        folder = Path(temporary)
        overrides = bench_overrides(steps, ROOT / "outputs" / "bench", url)
        config = load_config(CONFIG, overrides, environ={})
        model_dir = ensure_starter(config, build_task(config))
        rates, recorded = actor_alone(config, model_dir, folder, steps)
        results["actor alone"].append(rates)
        for _ in range(repeats):
            feeds = {"learner alone": offer_recorded(recorded, config), "pipeline": real_actor(config, folder)}
            for name, feed in feeds.items():
                results[name].append(learner_run(config, overrides, folder, name.replace(" ", "_"), feed))
            rates, recorded = actor_alone(config, model_dir, folder, steps)
            results["actor alone"].append(rates)
            typer.echo({name: round(rates[-1].completions_per_s, 1) for name, rates in results.items()})
    return results


def summary(results: dict[str, list[Rates]]) -> dict[str, object]:
    rows: dict[str, object] = {
        name: {
            field: dict(zip(("min", "median", "max"), spread([getattr(one, field) for one in rates]), strict=True))
            for field in Rates.__dataclass_fields__
        }
        for name, rates in results.items()
    }
    return {
        **rows,
        "pipeline / min(actor, learner)": spread(list(shares(results, speed))),
        "the same in processor time": spread(list(shares(results, processor_speed))),
    }


def shares(results: dict[str, list[Rates]], speed_of: Callable[[Rates], float]) -> Iterator[float]:
    """Pipeline over the slower side; the actor is measured before and after each, because machines drift."""
    around = pairwise(speed_of(one) for one in results["actor alone"])
    for actor, learner, together in zip(around, results["learner alone"], results["pipeline"], strict=True):
        yield speed_of(together) / min(statistics.fmean(actor), speed_of(learner))


def speed(rates: Rates) -> float:
    """Completions per second of the clock."""
    return rates.completions_per_s


def processor_speed(rates: Rates) -> float:
    """Completions per processor second of the busier side: less touched than the clock by who shares the machine."""
    return 1000 / max(rates.actor_cpu_ms, rates.learner_cpu_ms)


def spread(values: list[float]) -> tuple[float, float, float]:
    """(min, median, max), four digits."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return round(low, 4), round(middle, 4), round(high, 4)


def main(steps: int = 30, repeats: int = 3, output: Path = RESULT) -> None:
    """Measure, print, and write the result with machine and commit."""
    result = {"machine": describe_machine(), "steps": steps, "repeats": repeats, **summary(measure(steps, repeats))}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    typer.echo(json.dumps(result, indent=1))


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
