"""How many groups a second one Redis takes from a fleet of actors, against a bare stream of the same bytes.

Actors are simulated (asyncio tasks of one process that lease and send made-up groups at once), the learner is another
process that reads, commits and opens the gate without looking. Both streams use the same client, thread pool, server
and settings, and take turns.
"""

import asyncio
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
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import TypeAlias

import redis
import typer

from benchmarks.machine import ROOT, describe_machine
from lambdapo_async.broker.connection import connect, embedded_server
from lambdapo_async.broker.interface import Descriptor, Durable, EnqueueStatus
from lambdapo_async.broker.limits import RunLimits
from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.keys import RunKeys

RESULT = ROOT / "benchmarks" / "results" / "fleet.json"
FLEETS = (1, 10, 100, 1000)
SIZES = (198_000, 1_570_000)
LEASED_AT_ONCE = 4
READ_AT_ONCE = 64
STEP_GROUPS = 64
REPLY_BYTES = 16 * 1024**2
"""Of one read, for both: far below the server's output buffer limit."""
MAX_BYTES = 512 * 1024**2
TIMEOUT_S = 60.0
WARM_UP_S = 0.5
THREADS = 8
BARE = RunKeys("bare").queue

Window = tuple[float, float]
Consumed = tuple[list[float], float]
Counts: TypeAlias = "Queue[Consumed]"


@dataclass
class Tally:
    """What the actors of one measurement saw."""

    lease_s: list[float]
    sent: list[int]
    """Groups of each actor."""
    refused: int = 0


def limits_for(num_bytes: int) -> RunLimits:
    """A gate that only memory closes."""
    return RunLimits(
        max_staleness=0, groups_per_step=4096, max_groups=4096, max_bytes=MAX_BYTES, group_bytes=num_bytes, lease_s=60.0
    )


def consume_ours(
    url: str, run_id: str, num_bytes: int, ready: Event, stop: Event, counts: "Queue[list[float]]"
) -> None:
    """The learner; puts the time of every received group."""
    with contextlib.closing(RedisRun(url, run_id, timeout_s=TIMEOUT_S)) as run:
        run.run_store.create(b"{}", {}, fence=1)
        source = run.source(1, limits_for(num_bytes))
        source.initialise(Durable(watermarks={}, consumed=0, waiting=0, next_index=0, holes=()))
        run.run_store.set_phase("running", fence=1)
        ready.set()
        cpu_before = time.process_time()
        times: list[float] = []
        marks: dict[str, int] = {}
        released = 0
        while not stop.is_set():
            deliveries = source.read(READ_AT_ONCE, timeout_s=0.1)
            if deliveries:
                marks |= {one.descriptor.producer: one.descriptor.seq for one in deliveries}
                source.commit(marks)
                times += [time.monotonic()] * len(deliveries)
                if len(times) - released >= STEP_GROUPS:
                    released = len(times)
                    source.release(released)
    counts.put((times, time.process_time() - cpu_before))


def consume_bare(url: str, num_bytes: int, ready: Event, stop: Event, counts: Counts) -> None:
    """XREAD and XDEL."""
    with contextlib.closing(connect(url, timeout_s=TIMEOUT_S)) as client:
        client.delete(BARE)
        ready.set()
        cpu_before = time.process_time()
        times: list[float] = []
        cursor: bytes = b"0-0"
        count = max(1, min(READ_AT_ONCE, REPLY_BYTES // num_bytes))
        while not stop.is_set():
            reply = client.xread({BARE: cursor}, count=count, block=100)
            if reply:
                entries = reply[0][1]
                cursor = entries[-1][0]
                client.xdel(BARE, *(entry_id for entry_id, _ in entries))
                times += [time.monotonic()] * len(entries)
    counts.put((times, time.process_time() - cpu_before))


async def act_ours(run: RedisRun, number: int, payload: bytes, epoch: str, tally: Tally, stop: asyncio.Event) -> None:
    """Lease, send, again."""
    admission, sink, producer = run.admission(f"a{number}"), run.sink(), f"a{number}.0"
    while not stop.is_set():
        started = time.monotonic()
        leases = await asyncio.to_thread(admission.lease, LEASED_AT_ONCE)
        tally.lease_s.append(time.monotonic() - started)
        for lease in leases:
            if stop.is_set():
                return
            descriptor = Descriptor(producer, tally.sent[number] + 1, lease, 0, len(payload), 0.5)
            reply = await asyncio.to_thread(sink.enqueue, descriptor, payload, epoch=epoch)
            if reply.status is not EnqueueStatus.OK:
                tally.refused += 1
                return
            tally.sent[number] += 1
        if not leases:
            await asyncio.sleep(0.02)


async def act_bare(client: redis.Redis, number: int, payload: bytes, tally: Tally, stop: asyncio.Event) -> None:
    """XADD, again; a bare stream has no gate, so its length is watched as often as ours leases."""
    while not stop.is_set():
        length = await asyncio.to_thread(client.xlen, BARE)
        if length * len(payload) > MAX_BYTES:
            await asyncio.sleep(0.02)
            continue
        for _ in range(LEASED_AT_ONCE):
            if stop.is_set():
                return
            fields: dict[str | bytes, bytes] = {"p": payload}
            await asyncio.to_thread(client.xadd, BARE, fields)  # type: ignore[arg-type]
            tally.sent[number] += 1


async def drive(actors: list[Callable[[asyncio.Event], Coroutine[None, None, None]]], seconds: float) -> Window:
    """Run the actors; returns what counts of the time."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS))
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        for act in actors:
            tasks.create_task(act(stop))
        await asyncio.sleep(WARM_UP_S)
        started = time.monotonic()
        await asyncio.sleep(seconds)
        ended = time.monotonic()
        stop.set()
    return started, ended


@contextlib.contextmanager
def consumer(target: Callable[..., None], *arguments: object) -> Iterator[Callable[[], Consumed]]:
    """The learner's process; what is yielded stops it and returns what it put."""
    context = multiprocessing.get_context("spawn")
    ready, stop, counts = context.Event(), context.Event(), context.Queue()
    process = context.Process(target=target, args=(*arguments, ready, stop, counts))
    process.start()
    assert ready.wait(TIMEOUT_S)

    def finish() -> Consumed:
        stop.set()
        consumed: Consumed = counts.get(timeout=TIMEOUT_S)
        return consumed

    try:
        yield finish
    finally:
        stop.set()
        process.join(TIMEOUT_S)


def measure(kind: str, url: str, num_actors: int, num_bytes: int, seconds: float) -> dict[str, float]:
    """One stream of one fleet for ``seconds``."""
    payload, tally = os.urandom(num_bytes), Tally([], [0] * num_actors)
    run_id = f"fleet-{time.monotonic_ns()}"
    bare = ("bare", consume_bare, (url, num_bytes))
    ours = ("ours", consume_ours, (url, run_id, num_bytes))
    _, target, arguments = bare if kind == "bare" else ours
    with (
        contextlib.closing(connect(url, timeout_s=TIMEOUT_S)) as client,
        contextlib.closing(RedisRun(url, run_id, timeout_s=TIMEOUT_S)) as run,
        consumer(target, *arguments) as finish,
    ):
        epoch = "" if kind == "bare" else run.run_store.state().epoch
        actors: list[Callable[[asyncio.Event], Coroutine[None, None, None]]] = [
            (lambda stop, n=n: act_bare(client, n, payload, tally, stop))
            if kind == "bare"
            else (lambda stop, n=n: act_ours(run, n, payload, epoch, tally, stop))
            for n in range(num_actors)
        ]
        client.config_resetstat()
        redis_before, actors_before = redis_cpu_s(client), time.process_time()
        started, ended = asyncio.run(drive(actors, seconds))
        redis_s, actors_s = redis_cpu_s(client) - redis_before, time.process_time() - actors_before
        peak_bytes = client.info("memory")["used_memory_peak"]
        times, learner_s = finish()
        client.flushall()
    rate = sum(started <= at < ended for at in times) / (ended - started)
    found = {
        "groups_per_s": rate,
        "mb_per_s": rate * num_bytes / 1e6,
        "cpu_ms_per_group": 1000 * (redis_s + actors_s + learner_s) / len(times),
        "redis_cpu_ms_per_group": 1000 * redis_s / len(times),
        "redis_cpu_share": redis_s / (seconds + WARM_UP_S),
        "redis_peak_mb": peak_bytes / 1e6,
        "fairness": sum(tally.sent) ** 2 / (num_actors * sum(sent**2 for sent in tally.sent)),
        "refused": float(tally.refused),
    }
    if tally.lease_s:
        cuts = statistics.quantiles(tally.lease_s, n=100) if len(tally.lease_s) > 1 else tally.lease_s * 99
        found |= {"lease_p50_ms": 1000 * cuts[49], "lease_p99_ms": 1000 * cuts[98]}
    return found


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
            found = {"groups_per_s": 0.0}  # too slow to start on this machine at this load
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return found


def main(seconds: float = 3.0, rounds: int = 3, output: Path = RESULT, reverb_python: Path | None = None) -> None:
    """Measure every fleet and size, the streams in turn; write the medians.

    ``--reverb-python`` is the interpreter of an environment with ``dm-reverb[tensorflow]``; without it that column is
    left out.
    """
    with tempfile.TemporaryDirectory() as folder, embedded_server(Path(folder)) as url:
        with contextlib.closing(connect(url, timeout_s=TIMEOUT_S)) as client:
            version = client.info("server")["redis_version"]
        settings = {"seconds": seconds, "rounds": rounds, "max_bytes": MAX_BYTES, "leased_at_once": LEASED_AT_ONCE}
        result: dict[str, object] = {"machine": {**describe_machine(), "redis_server": version}, "settings": settings}
        rows: list[dict[str, object]] = []
        for num_bytes, num_actors in itertools.product(SIZES, FLEETS):
            row = compare(url, num_actors, num_bytes, seconds, rounds)
            if reverb_python is not None:
                row["reverb"] = measure_reverb(reverb_python, num_actors, num_bytes, seconds)
            rows.append(row)
            output.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")
            typer.echo(json.dumps(row))


def compare(url: str, num_actors: int, num_bytes: int, seconds: float, rounds: int) -> dict[str, object]:
    """Ours and the bare stream in turn: medians, and what share of the bare stream ours reaches."""
    kinds = ("ours", "bare")
    turns = [[measure(kind, url, num_actors, num_bytes, seconds) for kind in kinds] for _ in range(rounds)]
    in_time = [ours["groups_per_s"] / bare["groups_per_s"] for ours, bare in turns]
    in_cpu = [bare["cpu_ms_per_group"] / ours["cpu_ms_per_group"] for ours, bare in turns]
    return {
        "group_bytes": num_bytes,
        "actors": num_actors,
        "share_of_bare": statistics.median(in_time),
        "share_of_bare_in_cpu": statistics.median(in_cpu),
        "all_shares": {"in_time": in_time, "in_cpu": in_cpu},
        **{kind: medians([turn[i] for turn in turns]) for i, kind in enumerate(kinds)},
    }


def redis_cpu_s(client: redis.Redis) -> float:
    """Processor seconds of the server so far."""
    cpu = client.info("cpu")
    return float(cpu["used_cpu_user"] + cpu["used_cpu_sys"])


def medians(results: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(result[name] for result in results), 4) for name in results[0]}


if __name__ == "__main__":
    typer.run(main)
