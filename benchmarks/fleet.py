"""How many groups a second one Redis takes from a fleet of actors, against a bare stream of the same bytes.

Ours, a bare stream that waits for every group and one that sends as many at once as ours take turns on one server; so
do ours and the latter while the server keeps no log, and dm-reverb, which keeps none. What a group costs in processor
time is counted over all processes that touch it: it is the number that other load on the machine changes least.
"""

import asyncio
import bisect
import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import redis
import typer

from benchmarks.fleet_streams import (
    LEASED_AT_ONCE,
    MAX_BYTES,
    TIMEOUT_S,
    Act,
    Receipt,
    Tally,
    bare_actor,
    consume_bare,
    consume_ours,
    our_actor,
    sent_at_once,
)  # fmt: skip
from benchmarks.machine import ROOT, describe_machine
from lambdapo_async.broker.connection import connect, embedded_server
from lambdapo_async.broker.redis_run import RedisRun

RESULT = ROOT / "benchmarks" / "results" / "fleet.json"
FLEETS = (1, 10, 100, 1000)
SIZES = (198_000, 1_570_000)
KINDS = ("ours", "bare", "bare_at_once", "unlogged", "bare_at_once_unlogged")
PAIRS = (
    ("ours", "bare"),
    ("ours", "bare_at_once"),
    ("unlogged", "bare_at_once_unlogged"),
    ("ours", "reverb"),
    ("unlogged", "reverb"),
)
WARM_UP_S = 0.5
THREADS = 8


class Look(NamedTuple):
    """One moment."""

    at: float
    """``time.monotonic()``"""
    redis_s: float
    """Processor seconds by then."""
    actors_s: float
    sent: int
    """Groups by then."""


async def drive(actors: list[Act], seconds: float, look: Callable[[], Look]) -> tuple[Look, float]:
    """Run the actors; returns what ``look`` found when the time that counts began, and its end."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS))
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        for act in actors:
            tasks.create_task(act(stop))
        await asyncio.sleep(WARM_UP_S)
        started = look()
        await asyncio.sleep(seconds)
        ended = time.monotonic()
        stop.set()
    return started, ended


@contextlib.contextmanager
def consumer(target: Callable[..., None], *arguments: object) -> Iterator[Callable[[], list[Receipt]]]:
    """The learner's process; what is yielded stops it and returns what it put."""
    context = multiprocessing.get_context("spawn")
    ready, stop, receipts = context.Event(), context.Event(), context.Queue()
    process = context.Process(target=target, args=(*arguments, ready, stop, receipts))
    process.start()
    assert ready.wait(TIMEOUT_S)

    def finish() -> list[Receipt]:
        stop.set()
        received: list[Receipt] = receipts.get(timeout=TIMEOUT_S)
        return received

    try:
        yield finish
    finally:
        stop.set()
        process.join(TIMEOUT_S)


def measure(kind: str, url: str, num_actors: int, num_bytes: int, seconds: float) -> dict[str, float]:
    """One stream of one fleet for ``seconds``: one of ``KINDS``."""
    is_bare = kind.startswith("bare")
    payload, tally = os.urandom(num_bytes), Tally([0] * num_actors)
    run_id = f"fleet-{time.monotonic_ns()}"
    with (
        contextlib.closing(connect(url, timeout_s=TIMEOUT_S)) as client,
        contextlib.closing(RedisRun(url, run_id, timeout_s=TIMEOUT_S)) as run,
    ):
        start_afresh(client, is_logged=not kind.endswith("unlogged"))
        target, arguments = (consume_bare, (url,)) if is_bare else (consume_ours, (url, run_id))
        with consumer(target, *arguments, num_bytes) as finish:
            if is_bare:
                at_once = sent_at_once(num_bytes) if "at_once" in kind else 1
                actors = [bare_actor(client, number, payload, tally, at_once=at_once) for number in range(num_actors)]
            else:
                epoch = run.run_store.state().epoch
                actors = [our_actor(run, number, payload, epoch, tally) for number in range(num_actors)]
            look = partial(take_a_look, client, tally)
            started, ended = asyncio.run(drive(actors, seconds, look))
            received, after = finish(), look()
        peak_bytes = client.info("memory")["used_memory_peak"]
        client.flushall()
    found = {
        **rates(received, started, ended, after, num_bytes),
        "redis_peak_mb": peak_bytes / 1e6,
        "refused": float(tally.refused),
    }
    if sum(tally.sent) >= LEASED_AT_ONCE * num_actors:  # with fewer, no stream could have served all alike
        found["fairness"] = sum(tally.sent) ** 2 / (num_actors * sum(sent**2 for sent in tally.sent))
    if tally.lease_s:
        cuts = statistics.quantiles(tally.lease_s, n=100) if len(tally.lease_s) > 1 else tally.lease_s * 99
        found |= {"lease_p50_ms": 1000 * cuts[49], "lease_p99_ms": 1000 * cuts[98]}
    return found


def rates(received: list[Receipt], started: Look, ended: float, after: Look, num_bytes: int) -> dict[str, float]:
    """Groups received in time, and processor time per group of everything sent and received since the start."""
    first, last = (
        received[bisect.bisect(received, moment, key=lambda one: one.at) - 1] for moment in (started.at, ended)
    )
    rate = (last.count - first.count) / (ended - started.at)
    num_sent, num_received = after.sent - started.sent, received[-1].count - first.count
    cpu_ms = {
        "redis": 2000 * (after.redis_s - started.redis_s) / (num_sent + num_received),
        "actors": 1000 * (after.actors_s - started.actors_s) / num_sent,
        "learner": 1000 * (received[-1].learner_s - first.learner_s) / num_received,
    }
    return {
        "groups_per_s": rate,
        "mb_per_s": rate * num_bytes / 1e6,
        "cpu_ms_per_group": sum(cpu_ms.values()),
        **{f"{who}_cpu_ms_per_group": spent_ms for who, spent_ms in cpu_ms.items()},
    }


def take_a_look(client: redis.Redis, tally: Tally) -> Look:
    """At this moment."""
    return Look(time.monotonic(), redis_cpu_s(client), time.process_time(), sum(tally.sent))


def start_afresh(client: redis.Redis, *, is_logged: bool) -> None:
    """An empty server with an empty log: what one turn left behind is not the next one's to carry."""
    client.config_set("appendonly", "no")
    client.flushall()
    if is_logged:
        client.config_set("appendonly", "yes")
    deadline = time.monotonic() + TIMEOUT_S
    while is_rewriting(client):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    client.config_resetstat()


def is_rewriting(client: redis.Redis) -> bool:
    """Whether the log is being written anew."""
    state = client.info("persistence")
    return bool(state["aof_rewrite_in_progress"] or state["aof_rewrite_scheduled"])


def measure_reverb(python: Path, num_actors: int, num_bytes: int, seconds: float) -> dict[str, float]:
    """The same bytes through dm-reverb, in its own environment."""
    script = ROOT / "benchmarks" / "fleet_reverb.py"
    command = [python, script, str(num_bytes), str(num_actors), str(seconds)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=script.parent, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=TIMEOUT_S + seconds)
            found: dict[str, float] = json.loads(output.splitlines()[-1])
        except subprocess.TimeoutExpired:
            found = {"groups_per_s": 0.0, "cpu_ms_per_group": 0.0}  # too slow to start on this machine at this load
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return found


def main(
    seconds: float = 2.0,
    rounds: int = 3,
    actors: list[int] | None = None,
    group_bytes: list[int] | None = None,
    output: Path = RESULT,
    reverb_python: Path | None = None,
) -> None:
    """Measure every fleet and size, or those that are named, the streams in turn; write the medians.

    ``--reverb-python`` is the interpreter of an environment with ``dm-reverb[tensorflow]``; without it that column is
    left out.
    """
    with tempfile.TemporaryDirectory() as folder, embedded_server(Path(folder)) as url:
        with contextlib.closing(connect(url, timeout_s=TIMEOUT_S)) as client:
            version = client.info("server")["redis_version"]
        settings = {"seconds": seconds, "rounds": rounds, "max_bytes": MAX_BYTES, "leased_at_once": LEASED_AT_ONCE}
        result: dict[str, object] = {"machine": {**describe_machine(), "redis_server": version}, "settings": settings}
        rows: list[dict[str, object]] = []
        for num_bytes, num_actors in itertools.product(group_bytes or SIZES, actors or FLEETS):
            rows.append(row := compare(url, num_actors, num_bytes, seconds, rounds, reverb_python))
            output.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")
            typer.echo(json.dumps(row))


def compare(
    url: str, num_actors: int, num_bytes: int, seconds: float, rounds: int, reverb_python: Path | None
) -> dict[str, object]:
    """All kinds in turn: medians, and what share of the bare stream, and of dm-reverb, ours reaches."""
    turns: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind in KINDS:
            turns[kind].append(measure(kind, url, num_actors, num_bytes, seconds))
        if reverb_python is not None:
            found = measure_reverb(reverb_python, num_actors, num_bytes, seconds)
            turns.setdefault("reverb", []).append(found)
    shares = {f"{ours}_of_{other}": shares_of(turns[ours], turns[other]) for ours, other in PAIRS if other in turns}
    return {
        "group_bytes": num_bytes,
        "actors": num_actors,
        "shares": shares,
        **{kind: medians(results) for kind, results in turns.items()},
    }


def shares_of(ours: list[dict[str, float]], other: list[dict[str, float]]) -> dict[str, float | list[float]]:
    """By the clock and by processor time, one share for each round and their median; above 1 is in our favour."""
    pairs = [(mine, theirs) for mine, theirs in zip(ours, other, strict=True) if theirs["groups_per_s"] > 0]
    in_time = [mine["groups_per_s"] / theirs["groups_per_s"] for mine, theirs in pairs]
    in_cpu = [theirs["cpu_ms_per_group"] / mine["cpu_ms_per_group"] for mine, theirs in pairs]
    return {
        "in_time": statistics.median(in_time or [0.0]),
        "in_cpu": statistics.median(in_cpu or [0.0]),
        "every_in_time": in_time,
        "every_in_cpu": in_cpu,
    }


def redis_cpu_s(client: redis.Redis) -> float:
    """Processor seconds of the server so far, with its children that wrote its log anew."""
    cpu = client.info("cpu")
    return float(sum(cpu[f"used_cpu_{kind}"] for kind in ("user", "sys", "user_children", "sys_children")))


def medians(results: list[dict[str, float]]) -> dict[str, float]:
    names = [name for name in results[0] if all(name in result for result in results)]
    return {name: round(statistics.median(result[name] for result in results), 4) for name in names}


if __name__ == "__main__":
    typer.run(main)
