"""What the broker's contract tests share: a run that is under way, and short names for its moves."""

import time
from collections.abc import Callable, Mapping
from types import MappingProxyType

from lambdapo_async.broker.interface import Delivery, Descriptor, Durable, EnqueueReply, EnqueueStatus, RolloutSource
from lambdapo_async.broker.limits import RunLimits
from lambdapo_async.rollout import Lease
from tests.redis_fixtures import BrokerRun

LIMITS = RunLimits(max_staleness=1, groups_per_step=2, max_groups=32, max_bytes=1000, group_bytes=10, lease_s=60.0)
SHORT = RunLimits(max_staleness=1, groups_per_step=2, max_groups=32, max_bytes=1000, group_bytes=10, lease_s=0.05)
FOREVER_S = 10.0
"""Deadline of waits that end at once when the code is right."""


def start(run: BrokerRun, limits: RunLimits = LIMITS, *, fence: int = 1) -> RolloutSource:
    """The run as its first learner leaves it: created, initialised, running."""
    run.run_store.create(b"{}", {}, fence=fence)
    source = run.source(fence, limits)
    source.initialise(durable())
    run.run_store.set_phase("running", fence=fence)
    return source


def durable(
    watermarks: Mapping[str, int] = MappingProxyType({}),
    *,
    consumed: int = 0,
    waiting: int = 0,
    next_index: int = 0,
    holes: tuple[int, ...] = (),
) -> Durable:
    """What a learner holds; by default nothing."""
    return Durable(watermarks=watermarks, consumed=consumed, waiting=waiting, next_index=next_index, holes=holes)


def offer(
    run: BrokerRun,
    seq: int,
    lease: Lease,
    *,
    producer: str = "a.0",
    payload: bytes = b"payload",
    epoch: str | None = None,
) -> EnqueueReply:
    """One enqueue; the epoch is the run's unless it is given."""
    delivery = Delivery(Descriptor(producer, seq, lease, 0, len(payload), 0.5), payload)
    return run.sink().enqueue([delivery], epoch=run.run_store.state().epoch if epoch is None else epoch)


def train(*indices: int) -> tuple[Lease, ...]:
    return tuple(Lease("train", index) for index in indices)


def heldout(*indices: int, step: int = 5) -> tuple[Lease, ...]:
    return tuple(Lease("heldout", index, step) for index in indices)


def eventually(attempt: Callable[[], tuple[Lease, ...]]) -> tuple[Lease, ...]:
    """The first answer of ``attempt`` that is not empty."""
    found: list[tuple[Lease, ...]] = []

    def try_once() -> bool:
        found.append(attempt())
        return bool(found[-1])

    until(try_once)
    return found[-1]


def until(condition: Callable[[], bool]) -> None:
    """Ask until ``condition`` holds: the server's clock decides when."""
    deadline = time.monotonic() + FOREVER_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {FOREVER_S} s"


OK, DUP, GAP, FULL, EPOCH, WAIT, LATE = EnqueueStatus


def journal(source: RolloutSource, *, count: int) -> list[tuple[str, int]]:
    """Read ``count`` groups, as a learner does before it writes them down."""
    read: list[tuple[str, int]] = []
    while len(read) < count:
        deliveries = source.read(count - len(read), timeout_s=FOREVER_S)
        assert deliveries
        read += [(one.descriptor.producer, one.descriptor.seq) for one in deliveries]
    return read
