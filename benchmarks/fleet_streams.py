"""Our queue and a bare stream, each with simulated actors (asyncio tasks) and a learner (a process of its own).

Both use the same client, thread pool, server and settings, are bounded by the same bytes, and ask again after the same
pause where there is no room. A learner takes everything in before it ends, so that whole groups are paid for.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from typing import NamedTuple, TypeAlias

import redis

from actors.outbox import AT_ONCE_BYTES
from lambdapo_async.broker.connection import connect
from lambdapo_async.broker.interface import Delivery, Descriptor, Durable
from lambdapo_async.broker.limits import RunLimits
from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.broker.round_trip import round_trip
from lambdapo_async.keys import RunKeys
from lambdapo_async.rollout import Lease

LEASED_AT_ONCE = 4
READ_AT_ONCE = 64
STEP_GROUPS = 64
REPLY_BYTES = 4 * 1024**2
"""Of one read, for both."""
MAX_BYTES = 512 * 1024**2
TIMEOUT_S = 60.0
GATE_POLL_S = 0.1
"""As an actor asks again when no lease was granted."""
BARE = RunKeys("bare").queue

Act = Callable[[asyncio.Event], Coroutine[None, None, None]]
"""One actor, until the event is set."""


class Receipt(NamedTuple):
    """One batch at the learner."""

    at: float
    """``time.monotonic()``"""
    learner_s: float
    """Processor seconds by then."""
    count: int
    """Groups by then."""


Receipts: TypeAlias = "Queue[list[Receipt]]"


@dataclass
class Tally:
    """What the actors of one measurement saw."""

    sent: list[int]
    """Groups of each actor."""
    lease_s: list[float] = field(default_factory=list)
    refused: int = 0
    on_their_way: int = 0
    """Groups promised to a bare stream and not in it yet."""


def sent_at_once(num_bytes: int) -> int:
    """Groups in one round trip: as the outbox does, and a divisor of ``LEASED_AT_ONCE``."""
    return next(count for count in (4, 2, 1) if count == 1 or count * num_bytes <= AT_ONCE_BYTES)


def limits_for(num_bytes: int) -> RunLimits:
    """A gate that only memory closes."""
    return RunLimits(
        max_staleness=0, groups_per_step=4096, max_groups=4096, max_bytes=MAX_BYTES, group_bytes=num_bytes, lease_s=60.0
    )


def consume_ours(url: str, run_id: str, num_bytes: int, ready: Event, stop: Event, receipts: Receipts) -> None:
    """The learner of our queue: reads, commits, opens the gate."""
    with contextlib.closing(RedisRun(url, run_id, timeout_s=TIMEOUT_S)) as run:
        run.run_store.create(b"{}", {}, fence=1)
        source = run.source(1, limits_for(num_bytes))
        source.initialise(Durable(watermarks={}, consumed=0, waiting=0, next_index=0, holes=()))
        run.run_store.set_phase("running", fence=1)
        ready.set()
        count = 0
        received = [Receipt(time.monotonic(), time.process_time(), count)]
        released = 0
        while True:
            is_last = stop.is_set()
            deliveries = source.read(READ_AT_ONCE, timeout_s=0.1)
            if deliveries:
                source.commit({one.descriptor.producer: one.descriptor.seq for one in deliveries})
                count += len(deliveries)
                received.append(Receipt(time.monotonic(), time.process_time(), count))
                if count - released >= STEP_GROUPS:
                    released = count
                    source.release(released)
            elif is_last:
                break
        receipts.put(received)


def consume_bare(url: str, num_bytes: int, ready: Event, stop: Event, receipts: Receipts) -> None:
    """XREAD and XDEL."""
    with contextlib.closing(connect(url, timeout_s=TIMEOUT_S)) as client:
        ready.set()
        count = 0
        received = [Receipt(time.monotonic(), time.process_time(), count)]
        cursor: bytes = b"0-0"
        at_once = max(1, min(READ_AT_ONCE, REPLY_BYTES // num_bytes))
        while True:
            is_last = stop.is_set()
            reply = client.xread({BARE: cursor}, count=at_once, block=100)
            if reply:
                entries = reply[0][1]
                cursor = entries[-1][0]
                client.xdel(BARE, *(entry_id for entry_id, _ in entries))
                count += len(entries)
                received.append(Receipt(time.monotonic(), time.process_time(), count))
            elif is_last:
                break
        receipts.put(received)


def our_actor(run: RedisRun, number: int, payload: bytes, epoch: str, tally: Tally) -> Act:
    """Lease, send, again; like an outbox whose groups ended together."""
    admission, sink, producer = run.admission(f"a{number}"), run.sink(), f"a{number}.0"
    at_once = sent_at_once(len(payload))

    def lease(stop: asyncio.Event) -> tuple[Lease, ...]:
        started = time.monotonic()
        leases = () if stop.is_set() else admission.lease(LEASED_AT_ONCE)
        tally.lease_s.append(time.monotonic() - started)
        return leases

    def send(leases: Sequence[Lease], stop: asyncio.Event) -> None:
        if stop.is_set():
            return
        first = tally.sent[number] + 1
        deliveries = [
            Delivery(Descriptor(producer, seq, one, 0, len(payload), 0.5), payload)
            for seq, one in enumerate(leases, first)
        ]
        reply = sink.enqueue(deliveries, epoch=epoch)
        tally.sent[number] = reply.last
        tally.refused += first + len(leases) - 1 - reply.last

    async def act(stop: asyncio.Event) -> None:
        while not stop.is_set():
            leases = await asyncio.to_thread(lease, stop)
            for first in range(0, len(leases), at_once):
                await asyncio.to_thread(send, leases[first : first + at_once], stop)
            if not leases:
                await asyncio.sleep(GATE_POLL_S)

    return act


def bare_actor(client: redis.Redis, number: int, payload: bytes, tally: Tally, *, at_once: int) -> Act:
    """XADD, again; a bare stream has no gate, so its length is asked for as often as ours leases."""

    def length(stop: asyncio.Event) -> int:
        return 0 if stop.is_set() else int(client.xlen(BARE))

    def send(stop: asyncio.Event) -> None:
        if not stop.is_set():
            replies = round_trip(client, *[("XADD", BARE, "*", "p", payload)] * at_once)
            tally.sent[number] += sum(isinstance(reply, bytes) for reply in replies)

    async def act(stop: asyncio.Event) -> None:
        while not stop.is_set():
            queued = await asyncio.to_thread(length, stop)
            if (queued + tally.on_their_way + LEASED_AT_ONCE) * len(payload) > MAX_BYTES:
                await asyncio.sleep(GATE_POLL_S)
                continue
            tally.on_their_way += LEASED_AT_ONCE
            for _ in range(0, LEASED_AT_ONCE, at_once):
                await asyncio.to_thread(send, stop)
                tally.on_their_way -= at_once

    return act
