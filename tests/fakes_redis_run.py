"""What the brokers in memory share: all that Redis would hold of a run."""

import threading
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lambdapo_async.broker.heartbeat import Heartbeat
from lambdapo_async.broker.interface import Delivery, Phase
from lambdapo_async.broker.limits import RunLimits
from lambdapo_async.errors import FencedError, LostDataError
from lambdapo_async.rollout import Lease, Split
from lambdapo_async.weights.catch_up import Available
from tests.fakes_canary import FakeCanaryStore

SCHEMA = 3
POLL_S = 0.005


@dataclass
class FakeRedisRun:
    """What Redis holds of a run."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    fence: int | None = None
    owner: str = ""
    epoch: str = ""
    schema: int | None = None
    phase: Phase | None = None
    limits: RunLimits | None = None
    admitted: int = 0
    consumed: int = 0
    frontier: int = 0
    is_open: bool = False
    """Whether its learner has initialised this incarnation of the server."""
    ticks: int = 0
    learner_silent_s: float = 0.0
    full: int = 0
    late: int = 0
    expired: int = 0
    quarantined: int = 0
    config: bytes | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    rows: dict[Split, list[Mapping[str, str | None]]] = field(default_factory=dict)
    queue: list[Delivery] = field(default_factory=list)
    accepted: dict[str, int] = field(default_factory=dict)
    committed: dict[str, int] = field(default_factory=dict)
    held: dict[Lease, tuple[str, float]] = field(default_factory=dict)
    lines: dict[Split, deque[Lease]] = field(default_factory=lambda: {"train": deque(), "heldout": deque()})
    partials: dict[Lease, bytes] = field(default_factory=dict)
    answered: set[Lease] = field(default_factory=set)
    set_aside: set[str] = field(default_factory=set)
    beats: dict[str, tuple[Heartbeat, float]] = field(default_factory=dict)
    weight_files: dict[Available, bytes] = field(default_factory=dict)
    lost_files: set[Available] = field(default_factory=set)
    """Listed, but a part of them is gone."""
    head: int | None = None
    canary: FakeCanaryStore = field(init=False)

    def __post_init__(self) -> None:
        self.canary = FakeCanaryStore(self.check_fence)

    def take_over(self, fence: int, owner: str) -> None:
        stored = -1 if self.fence is None else self.fence
        if stored > fence or (stored == fence and self.owner != owner):
            raise FencedError(f"another learner owns the run now (fence {stored})")
        self.fence, self.owner, self.learner_silent_s = fence, owner, 0.0
        self.epoch = self.epoch or uuid.uuid4().hex

    def check_fence(self, fence: int) -> None:
        if self.fence is None or self.fence < fence:
            raise LostDataError("this Redis does not hold the run any more")
        if self.fence != fence:
            raise FencedError(f"another learner owns the run now (fence {self.fence})")

    def restart(self) -> None:
        """The server comes back with all its data."""
        self.is_open = False

    def check_synced(self, fence: int, ticks: int) -> None:
        self.check_fence(fence)
        if not self.is_open or self.ticks < ticks:
            raise LostDataError("Redis is not as its learner left it")

    def put_in_front(self, leases: Sequence[Lease]) -> None:
        for lease in reversed(leases):
            del self.held[lease]
            self.lines[lease.split].appendleft(lease)

    @property
    def num_bytes(self) -> int:
        return sum(len(delivery.payload) for delivery in self.queue)
