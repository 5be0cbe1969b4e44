"""The same bytes through dm-reverb: ``python fleet_reverb.py NUM_BYTES NUM_ACTORS SECONDS`` prints what it reached.

Runs in an environment of its own (``pip install dm-reverb[tensorflow]``), so it imports nothing of ours. The table is
a queue that hands out every group once, as long as ours may become. Server, writers and reader are processes.
"""

import json
import multiprocessing
import os
import sys
import threading
import time
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import reverb

MAX_BYTES = 512 * 1024**2
WARM_UP_S = 0.5
THREADS = 8


def serve(num_bytes: int, ports: "Queue[int]") -> None:
    """The server."""
    server = reverb.Server([reverb.Table.queue("groups", MAX_BYTES // num_bytes)])
    ports.put(server.port)
    server.wait()


def write(port: int, num_bytes: int, num_actors: int, stop: Event) -> None:
    """The actors: as many clients, on as many threads as ours; like ours, each waits for an item's confirmation.

    A writer that stays open is several times faster than ``Client.insert``, which opens one per item.
    """
    payload = np.frombuffer(os.urandom(num_bytes), np.uint8)

    def insert() -> None:
        with reverb.Client(f"localhost:{port}").trajectory_writer(num_keep_alive_refs=1) as writer:
            while not stop.is_set():
                writer.append([payload])
                writer.create_item("groups", 1.0, [writer.history[0][-1:]])
                writer.flush()

    for _ in range(min(num_actors, THREADS)):
        threading.Thread(target=insert, daemon=True).start()
    stop.wait()
    os._exit(0)


def cpu_s(*process_ids: int) -> float:
    """Processor seconds of these processes so far."""
    fields = [Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split() for one in process_ids]
    return sum(int(ticks) for one in fields for ticks in one[11:13]) / os.sysconf("SC_CLK_TCK")


def main(num_bytes: int, num_actors: int, seconds: float) -> None:
    """Read for ``seconds``."""
    context = multiprocessing.get_context("spawn")
    ports, stop = context.Queue(), context.Event()
    server = context.Process(target=serve, args=(num_bytes, ports))
    server.start()
    port = ports.get(timeout=60)
    writer = context.Process(target=write, args=(port, num_bytes, num_actors, stop))
    writer.start()
    client = reverb.Client(f"localhost:{port}")
    samples = iter(client.sample("groups", num_samples=10**9, emit_timesteps=False))
    next(samples)
    started = time.monotonic()
    while time.monotonic() - started < WARM_UP_S:
        next(samples)
    processes = (server.pid, writer.pid, os.getpid())
    cpu_before = cpu_s(*processes)
    started, count = time.monotonic(), 0
    while time.monotonic() - started < seconds:
        next(samples)
        count += 1
    cpu_ms = 1000 * (cpu_s(*processes) - cpu_before) / count
    stop.set()
    server.kill()
    print(json.dumps({"groups_per_s": count / seconds, "cpu_ms_per_group": cpu_ms}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
