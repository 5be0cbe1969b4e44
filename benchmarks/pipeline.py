"""Actor alone, learner alone, and both together, on the demo's model and task, in one run.

    python -m benchmarks.pipeline [--steps 30] [--repeats 3]

The actor alone streams to a consumer that only reads and opens the gate. The learner alone reads groups recorded from
that actor, offered as fast as it takes them. The pipeline is the two of them, pinned to one core each; so are they when
alone. Groups with equal rewards are kept, so that a completion sampled is a completion trained on.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import msgpack
import numpy as np
import torch
import typer
from transformers import AutoTokenizer

from benchmarks.machine import ROOT, describe_machine
from lambdapo_async.broker.connection import embedded_server
from lambdapo_async.broker.interface import Delivery, Descriptor, Durable, EnqueueStatus, RunLimits
from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.config import RunConfig, load_config
from lambdapo_async.errors import RunNotFoundError
from lambdapo_async.metrics import STEP, read_metrics
from lambdapo_async.tasks.prompts import PromptEncoder
from lambdapo_async.tasks.registry import build_task
from lambdapo_async.weights.canary import ModelIdentity
from learner.canary import LearnerCanary, canary_sequences
from learner.policy import Policy
from learner.publisher import Publisher
from learner.session import fitting_rows
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
    learner_idle_share: float
    actor_idle_share: float
    staleness_mean: float


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


@contextmanager
def process(core: int, log: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """One of ours, on one core."""
    with log.open("ab") as output:
        started = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )
    try:
        yield started
    finally:
        started.terminate()
        try:
            started.wait(60)
        except subprocess.TimeoutExpired:
            started.kill()


def wait_for(
    condition: Callable[[], bool], *watched: subprocess.Popen[bytes], log: Path, timeout_s: float = 300
) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if any(one.poll() not in (None, 0) for one in watched) or time.monotonic() > deadline:
            sys.exit(f"a process failed or hangs; its log:\n{log.read_text()[-3000:]}")
        time.sleep(0.05)


class Consumer:
    """The learner's side of Redis without a learner: publishes version 0, then reads and opens the gate."""

    def __init__(self, config: RunConfig, run_id: str, model_dir: Path) -> None:
        self.config = config
        self.run = RedisRun(config.broker.url, run_id, timeout_s=config.broker.timeout_s)
        policy = Policy.load(
            model_dir, revision=None, config=config.learner, temperature=1.0, device=torch.device("cpu")
        )
        task, tokenizer = build_task(config), AutoTokenizer.from_pretrained(model_dir)
        rows = fitting_rows(task, tokenizer, config)
        self.run.run_store.create(json.dumps(config.published()).encode(), policy.model_files, fence=1)
        self.run.run_store.put_rows("train", [row.as_map() for row in rows.train])
        self.run.run_store.put_rows("heldout", [row.as_map() for row in rows.heldout])
        self.source = self.run.source(1, RunLimits.of(config))
        self.source.initialise(Durable(watermarks={}, consumed=0, waiting=0, next_index=0, holes=()))
        publisher = Publisher(self.run.weights_for(config.weights), run_id=run_id, fence=1, config=config.weights)
        publisher.publish(0, policy, consumed=0)
        publisher.flush()
        scored = canary_sequences(
            [rows.train], PromptEncoder(tokenizer, task, config), tokenizer, max_tokens=config.sampling.max_tokens
        )
        canary = LearnerCanary(self.run.canary, policy, scored, identity=ModelIdentity.of(policy.model_files), fence=1)
        canary.publish(0, publisher.checksum(), keyframe_version=0)
        publisher.close()
        self.run.run_store.set_phase("running", fence=1)
        self.consumed = 0

    def read(self, count: int, *watched: subprocess.Popen[bytes], log: Path) -> list[Delivery]:
        deliveries: list[Delivery] = []

        def enough() -> bool:
            for delivery in self.source.read(self.config.rollout.groups_per_step, timeout_s=0.2):
                deliveries.append(delivery)
                self.consumed += 1
                self.source.release(self.consumed)
                self.source.commit({delivery.descriptor.producer: delivery.descriptor.seq})
            return len(deliveries) >= count

        wait_for(enough, *watched, log=log)
        return deliveries


def actor_alone(config: RunConfig, model_dir: Path, folder: Path, steps: int) -> tuple[Rates, list[Delivery]]:
    run_id = f"actor-{uuid.uuid4().hex[:8]}"
    consumer = Consumer(config, run_id, model_dir)
    log = folder / "actor_alone.log"
    with process(ACTOR_CORE, log, "actors", "--redis-url", config.broker.url, "--run-id", run_id) as actor:
        warm_up = consumer.read(WARM_UP_STEPS * config.rollout.groups_per_step, actor, log=log)
        started, before = time.monotonic(), consumer.run.fleet.members()[0]
        deliveries = consumer.read(steps * config.rollout.groups_per_step, actor, log=log)
        elapsed = time.monotonic() - started
        after = consumer.run.fleet.members()[0]
    completions = len(deliveries) * config.rollout.group_size
    tokens = (after.tokens - before.tokens) / (after.completions - before.completions) * completions
    return Rates(completions / elapsed, tokens / elapsed, 1.0, after.idle_share, 0.0), warm_up + deliveries


Feed = Callable[[str, subprocess.Popen[bytes], Path], None]


def learner_run(config: RunConfig, overrides: Sequence[str], folder: Path, name: str, feed: Feed) -> Rates:
    """One learner process on its core, fed by ``feed``, until its last step."""
    run_id = f"{name}-{uuid.uuid4().hex[:8]}"
    log = folder / f"{name}.log"
    settings = [part for override in overrides for part in ("--set", override)]
    with process(LEARNER_CORE, log, "learner", str(CONFIG), "--run-id", run_id, *settings) as learner:
        feed(run_id, learner, log)
        wait_for(lambda: learner.poll() is not None, learner, log=log, timeout_s=600)
    return rates_of(config.output_dir / run_id / "metrics.jsonl", config)


def rates_of(metrics: Path, config: RunConfig) -> Rates:
    """Steady state: all steps but the first ones."""
    rows = [row for row in read_metrics(metrics) if row.kind == STEP][WARM_UP_STEPS:]
    per_step = config.rollout.groups_per_step * config.rollout.group_size
    elapsed = rows[-1].time - rows[0].time
    completions = per_step * (len(rows) - 1)

    def mean(name: str) -> float:
        return statistics.fmean(row.values[name] for row in rows[1:])

    return Rates(
        completions_per_s=completions / elapsed,
        tokens_per_s=sum(row.values["tokens/trained"] for row in rows[1:]) / elapsed,
        learner_idle_share=mean("time/wait_s") * (len(rows) - 1) / elapsed,
        actor_idle_share=mean("actors/idle_share"),
        staleness_mean=mean("staleness/mean"),
    )


def offer_recorded(recorded: Sequence[Delivery], config: RunConfig) -> Feed:
    def feed(run_id: str, learner: subprocess.Popen[bytes], log: Path) -> None:
        """Offer the recorded groups over and over, ahead of the learner by as much as the gate would allow."""
        run = RedisRun(config.broker.url, run_id, timeout_s=TIMEOUT_S)
        wait_for(lambda: is_running(run), learner, log=log)
        admission, sink, epoch = run.admission("feeder"), run.sink(), run.run_store.state().epoch
        seq = 0
        while learner.poll() is None:
            leases = admission.lease(config.rollout.groups_per_step)
            for lease in leases:
                seq += 1
                payload = answered_now(recorded[seq % len(recorded)].payload, lease.id, run.weights.head())
                reply = sink.enqueue(Descriptor("feeder", seq, lease, 0, len(payload), 0.5), payload, epoch=epoch)
                if reply.status is not EnqueueStatus.OK:
                    sys.exit(f"the queue answered {reply}; the learner's log:\n{log.read_text()[-3000:]}")
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
    def feed(run_id: str, learner: subprocess.Popen[bytes], log: Path) -> None:
        run = RedisRun(config.broker.url, run_id, timeout_s=TIMEOUT_S)
        wait_for(lambda: is_running(run), learner, log=log)
        actor_log = folder / "pipeline_actor.log"
        with process(ACTOR_CORE, actor_log, "actors", "--redis-url", config.broker.url, "--run-id", run_id) as actor:
            wait_for(lambda: learner.poll() is not None, learner, actor, log=actor_log, timeout_s=900)

    return feed


def measure(steps: int, repeats: int) -> dict[str, list[Rates]]:
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
    return {**rows, "pipeline / min(actor, learner)": spread(list(shares(results)))}


def shares(results: dict[str, list[Rates]]) -> Iterator[float]:
    """Pipeline over the slower side; the actor is measured before and after each, because machines drift."""
    around = pairwise(one.completions_per_s for one in results["actor alone"])
    for actor, learner, together in zip(around, results["learner alone"], results["pipeline"], strict=True):
        yield together.completions_per_s / min(statistics.fmean(actor), learner.completions_per_s)


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
