"""The broker in memory: the same seams on one shared state, held to the same contract tests as Redis.

``FakeRun(run_id, state)`` is one process; processes of one run share the ``FakeRedisRun``.
"""

import threading
import time
import uuid
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from lambdapo_async.broker.heartbeat import Heartbeat
from lambdapo_async.broker.interface import (
    Delivery,
    Descriptor,
    Durable,
    EnqueueReply,
    EnqueueStatus,
    Marks,
    Phase,
    QueueStats,
    RunState,
)
from lambdapo_async.broker.limits import RunLimits
from lambdapo_async.broker.partials import SHARE_OF_QUEUE
from lambdapo_async.config.weights import WeightsConfig
from lambdapo_async.errors import (
    BrokerError,
    FencedError,
    LostDataError,
    RunNotFoundError,
    RunNotPublishedError,
    TaskError,
    WeightsError,
    WeightsGoneError,
)
from lambdapo_async.rollout import Lease, Split
from lambdapo_async.seal import Seal
from lambdapo_async.weights.catch_up import Available
from lambdapo_async.weights.manifest import NewFile, base_of, check_version, name_of
from lambdapo_async.weights.retention import Retention
from tests.fakes_canary import FakeCanaryStore

SCHEMA = 2
_POLL_S = 0.005


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


class FakeAdmission:
    """``interface.Admission``"""

    def __init__(self, state: FakeRedisRun, actor_id: str) -> None:
        self._state, self._actor_id = state, actor_id

    def lease(self, max_count: int) -> tuple[Lease, ...]:
        state = self._state
        with state.lock:
            if state.phase != "running" or state.limits is None or not state.is_open:
                return ()
            if self._actor_id in state.set_aside:
                return ()
            now = time.monotonic()
            expired = [lease for lease, (_, expiry) in state.held.items() if expiry <= now]
            state.expired += len(expired)
            state.put_in_front(sorted(expired, key=lambda lease: (state.held[lease][1], lease.id)))
            limits = state.limits
            room = min(limits.max_groups - len(state.queue), (limits.max_bytes - state.num_bytes) // limits.group_bytes)
            max_count = min(max_count, room - len(state.held))
            granted: list[Lease] = []
            for line in (state.lines["heldout"], state.lines["train"]):
                while line and len(granted) < max_count:
                    granted.append(line.popleft())
            while len(granted) < max_count and state.admitted - state.consumed < state.limits.capacity:
                lease = Lease("train", state.frontier)
                state.frontier += 1
                if lease not in state.answered:
                    granted.append(lease)
                    state.admitted += 1
            for lease in granted:
                state.held[lease] = (self._actor_id, now + state.limits.lease_s)
            return tuple(granted)

    def renew(self, leases: Sequence[Lease]) -> tuple[Lease, ...]:
        state = self._state
        with state.lock:
            if not state.is_open:
                return ()
            lost = tuple(lease for lease in leases if state.held.get(lease, ("",))[0] != self._actor_id)
            for lease in set(leases) - set(lost):
                assert state.limits is not None
                state.held[lease] = (self._actor_id, time.monotonic() + state.limits.lease_s)
            return lost

    def hand_back(self, leases: Sequence[Lease]) -> None:
        with self._state.lock:
            ours = [lease for lease in leases if self._state.held.get(lease, ("",))[0] == self._actor_id]
            self._state.put_in_front(ours)


class FakePartials:
    """``partials.PartialStore``; nothing expires."""

    def __init__(self, state: FakeRedisRun, actor_id: str) -> None:
        self._state, self._actor_id = state, actor_id

    def leave(self, lease: Lease, payload: bytes) -> bool:
        state = self._state
        with state.lock:
            others = sum(len(kept) for of, kept in state.partials.items() if of != lease)
            limit = 0.0 if state.limits is None else state.limits.max_bytes / SHARE_OF_QUEUE
            if not self._holds(lease) or others + len(payload) > limit:
                return False
            state.partials[lease] = payload
            return True

    def take(self, lease: Lease) -> bytes | None:
        with self._state.lock:
            return self._state.partials.get(lease) if self._holds(lease) else None

    def forget(self, lease: Lease) -> None:
        with self._state.lock:
            self._state.partials.pop(lease, None)

    def _holds(self, lease: Lease) -> bool:
        return self._state.held.get(lease, ("",))[0] == self._actor_id


class FakeRolloutSink:
    """``interface.RolloutSink``"""

    def __init__(self, state: FakeRedisRun) -> None:
        self._state = state

    def enqueue(self, descriptor: Descriptor, payload: bytes, *, epoch: str) -> EnqueueReply:
        state, producer = self._state, descriptor.producer
        with state.lock:
            status = self._status(descriptor, payload, epoch)
            if status is EnqueueStatus.OK:
                self._accept(descriptor, payload)
            return EnqueueReply(status, state.accepted.get(producer, 0), state.committed.get(producer, 0), state.epoch)

    def marks(self, producer: str) -> Marks:
        state = self._state
        with state.lock:
            accepted, committed = state.accepted.get(producer, 0), state.committed.get(producer, 0)
            return Marks(state.is_open, accepted, committed, state.epoch)

    def _status(self, descriptor: Descriptor, payload: bytes, epoch: str) -> EnqueueStatus:
        state = self._state
        last = state.accepted.get(descriptor.producer, 0)
        if descriptor.seq <= last:
            return EnqueueStatus.DUP
        if not state.is_open or state.limits is None:
            return EnqueueStatus.WAIT
        if epoch != state.epoch:
            return EnqueueStatus.EPOCH
        if descriptor.seq != last + 1:
            return EnqueueStatus.GAP
        holder = state.held.get(descriptor.lease, (None,))[0]
        ours = holder is not None and f"{descriptor.producer}.".startswith(f"{holder}.")
        if (holder is not None and not ours) or descriptor.lease in state.answered:
            state.late += 1
            if ours:
                del state.held[descriptor.lease]
                state.admitted -= descriptor.lease.split == "train"
            return EnqueueStatus.LATE
        if len(payload) > state.limits.max_bytes:
            raise BrokerError(f"group {descriptor.lease.id} has {len(payload)} bytes, more than broker.max_bytes")
        if len(state.queue) >= state.limits.max_groups or state.num_bytes + len(payload) > state.limits.max_bytes:
            state.full += 1
            return EnqueueStatus.FULL
        return EnqueueStatus.OK

    def _accept(self, descriptor: Descriptor, payload: bytes) -> None:
        state, lease = self._state, descriptor.lease
        if lease in state.held:
            del state.held[lease]
        elif lease in state.lines[lease.split]:
            state.lines[lease.split].remove(lease)
        elif lease.split == "train":
            state.admitted += 1
        state.queue.append(Delivery(descriptor, payload))
        state.accepted[descriptor.producer] = descriptor.seq
        state.answered.add(lease)


class FakeRolloutSource:
    """``interface.RolloutSource``"""

    def __init__(self, state: FakeRedisRun, owner: str, fence: int, limits: RunLimits) -> None:
        self._state, self._owner, self._fence, self._limits = state, owner, fence, limits
        self._received: dict[str, int] = {}
        self._ticks = 0

    def initialise(self, durable: Durable) -> None:
        state = self._state
        with state.lock:
            state.take_over(self._fence, self._owner)
            state.limits = self._limits
            self._sort_out(durable.watermarks)
            self._recount(durable)
            state.is_open = True
            state.ticks += 1
            self._ticks, self._received = state.ticks, dict(durable.watermarks)

    def _sort_out(self, watermarks: Mapping[str, int]) -> None:
        state, kept = self._state, list[Delivery]()
        accepted = dict.fromkeys(state.accepted, 0) | dict(watermarks)
        for one in state.queue:
            if one.descriptor.seq == accepted.get(one.descriptor.producer, 0) + 1:
                accepted[one.descriptor.producer] = one.descriptor.seq
                kept.append(one)
        state.queue, state.accepted = kept, accepted
        for producer in accepted:
            state.committed[producer] = max(state.committed.get(producer, 0), watermarks.get(producer, 0))

    def _recount(self, durable: Durable) -> None:
        state = self._state
        state.lines["heldout"].clear()
        state.frontier = max(state.frontier, durable.next_index)
        missing = [Lease("train", at) for at in (*durable.holes, *range(durable.next_index, state.frontier))]
        queued = [one.descriptor.lease for one in state.queue if one.descriptor.lease.split == "train"]
        expiry = time.monotonic() + self._limits.lease_s
        state.held = {
            lease: (holder, expiry)
            for lease, (holder, _) in state.held.items()
            if lease.split == "heldout" or (lease in missing and lease not in queued)
        }
        elsewhere = [*(lease for lease in state.held if lease.split == "train"), *queued]
        in_line = [lease for lease in state.lines["train"] if lease in missing and lease not in elsewhere]
        lost = [lease for lease in missing if lease not in elsewhere and lease not in in_line]
        state.lines["train"] = deque(dict.fromkeys(lost + in_line))
        state.answered = {lease for lease in state.answered if self._is_answered(lease, missing, queued)}
        state.consumed = durable.consumed
        state.admitted = durable.consumed + durable.waiting + len(elsewhere) + len(state.lines["train"])

    def _is_answered(self, lease: Lease, missing: Sequence[Lease], queued: Sequence[Lease]) -> bool:
        is_lost = lease not in queued and (lease in missing or lease.index >= self._state.frontier)
        return lease.split == "heldout" or not is_lost

    def read(self, max_groups: int, *, timeout_s: float) -> list[Delivery]:
        deadline = time.monotonic() + timeout_s
        while True:
            with self._state.lock:
                self._state.check_synced(self._fence, self._ticks)
                unread = [delivery for delivery in self._state.queue if self._is_unread(delivery.descriptor)]
                for delivery in unread[:max_groups]:
                    self._take(delivery.descriptor)
            if unread or time.monotonic() >= deadline:
                return unread[:max_groups]
            time.sleep(_POLL_S)

    def _take(self, descriptor: Descriptor) -> None:
        if descriptor.seq != self._received.get(descriptor.producer, 0) + 1:
            raise LostDataError(f"group {descriptor.seq} of {descriptor.producer} does not follow")
        self._received[descriptor.producer] = descriptor.seq

    def release(self, consumed: int) -> None:
        with self._state.lock:
            self._state.check_fence(self._fence)
            self._state.consumed = max(self._state.consumed, consumed)

    def commit(self, watermarks: Mapping[str, int], *, duplicates: Collection[tuple[str, int]] = ()) -> None:
        state = self._state
        with state.lock:
            state.check_synced(self._fence, self._ticks)
            state.ticks += 1
            state.learner_silent_s = 0.0
            self._ticks = state.ticks
            for producer, mark in watermarks.items():
                for marks in (state.accepted, state.committed):
                    marks[producer] = max(marks.get(producer, 0), mark)
            kept = []
            for one in state.queue:
                if one.descriptor.seq > watermarks.get(one.descriptor.producer, 0):
                    kept.append(one)
                elif (one.descriptor.producer, one.descriptor.seq) in duplicates:
                    state.admitted -= 1
            state.queue = kept

    def quarantine(self, descriptor: Descriptor, payload: bytes, reason: str) -> None:
        with self._state.lock:
            self._state.check_fence(self._fence)
            self._state.quarantined += 1

    def request_evaluation(self, leases: Sequence[Lease]) -> None:
        state = self._state
        with state.lock:
            state.check_fence(self._fence)
            for lease in leases:
                state.answered.discard(lease)
                if lease not in state.held and lease not in state.lines["heldout"]:
                    state.lines["heldout"].append(lease)

    def stats(self) -> QueueStats:
        state = self._state
        with state.lock:
            state.check_fence(self._fence)
            return QueueStats(
                queued=len(state.queue),
                num_bytes=state.num_bytes,
                leased=len(state.held),
                returned=len(state.lines["train"]),
                admitted=state.admitted - state.consumed,
                quarantined=state.quarantined,
                full=state.full,
                late=state.late,
                expired=state.expired,
            )

    def _is_unread(self, descriptor: Descriptor) -> bool:
        return descriptor.seq > self._received.get(descriptor.producer, 0)


class FakeFleet:
    """``interface.Fleet``"""

    def __init__(self, state: FakeRedisRun) -> None:
        self._state = state

    def beat(self, heartbeat: Heartbeat) -> bool:
        with self._state.lock:
            lease_s = self._state.limits.lease_s if self._state.limits else 60.0
            self._state.beats[heartbeat.actor_id] = (heartbeat, time.monotonic() + lease_s)
            return heartbeat.actor_id in self._state.set_aside

    def members(self) -> tuple[Heartbeat, ...]:
        with self._state.lock:
            beats = (self._state.beats[actor_id] for actor_id in sorted(self._state.beats))
            return tuple(heartbeat for heartbeat, expiry in beats if expiry > time.monotonic())

    def leave(self, actor_id: str) -> None:
        with self._state.lock:
            self._state.beats.pop(actor_id, None)


class FakeFleetControl:
    """``fleet_control.FleetControl``"""

    def __init__(self, state: FakeRedisRun, fence: int) -> None:
        self._state, self._fence = state, fence

    def quarantine(self, actor_ids: Collection[str]) -> None:
        state = self._state
        with state.lock:
            state.check_fence(self._fence)
            state.set_aside |= set(actor_ids)
            theirs = [lease for lease, (holder, _) in state.held.items() if holder in state.set_aside]
            state.put_in_front(sorted(theirs, key=lambda lease: (state.held[lease][1], lease.id)))

    def readmit(self, actor_ids: Collection[str]) -> None:
        with self._state.lock:
            self._state.check_fence(self._fence)
            self._state.set_aside -= set(actor_ids)

    def quarantined(self) -> frozenset[str]:
        with self._state.lock:
            return frozenset(self._state.set_aside)


class FakeRunStore:
    """``interface.RunStore``"""

    def __init__(self, state: FakeRedisRun, owner: str, run_id: str) -> None:
        self._state, self._owner, self._run_id = state, owner, run_id

    def take_over(self, *, fence: int) -> None:
        with self._state.lock:
            self._state.take_over(fence, self._owner)

    def create(self, config_json: bytes, model_files: Mapping[str, bytes], *, fence: int) -> None:
        state = self._state
        with state.lock:
            state.take_over(fence, self._owner)
            state.schema, state.phase = SCHEMA, "starting"
            state.config, state.files = config_json, dict(model_files)

    def put_rows(self, split: Split, rows: Sequence[Mapping[str, str | None]]) -> None:
        if len(rows) > 10_000_000:
            raise TaskError(f"{len(rows)} {split} rows are too many: set task.max_rows")
        with self._state.lock:
            self._state.rows[split] = [dict(row) for row in rows]

    def config_json(self) -> bytes:
        with self._state.lock:
            self.state()
            if self._state.config is None:
                raise RunNotPublishedError(f"run {self._run_id} has no config yet")
            return self._state.config

    def model_files(self) -> dict[str, bytes]:
        with self._state.lock:
            if not self._state.files:
                raise RunNotFoundError(f"run {self._run_id} has no model files yet")
            return dict(self._state.files)

    def num_rows(self, split: Split) -> int:
        with self._state.lock:
            if split not in self._state.rows:
                raise RunNotPublishedError(f"run {self._run_id} has no {split} rows yet")
            return len(self._state.rows[split])

    def row(self, split: Split, index: int) -> Mapping[str, str | None]:
        with self._state.lock:
            rows = self._state.rows.get(split)
            if rows is None:
                raise RunNotFoundError(f"run {self._run_id} has no rows from 0 on in {split}")
            if not 0 <= index < len(rows):
                raise BrokerError(f"run {self._run_id} has no row {index} in {split}")
            return rows[index]

    def state(self) -> RunState:
        state = self._state
        with state.lock:
            if state.schema is None or state.phase is None:
                raise RunNotPublishedError(f"this Redis holds no run {self._run_id!r}: check the run id and the URL")
            if state.schema != SCHEMA:
                raise RunNotFoundError(f"run {self._run_id} speaks schema {state.schema}, this version speaks {SCHEMA}")
            version = -1 if state.head is None else state.head
            return RunState(state.phase, state.epoch, version, state.schema, state.learner_silent_s)

    def set_phase(self, phase: Phase, *, fence: int) -> None:
        with self._state.lock:
            self._state.check_fence(fence)
            self._state.phase = phase


class FakeWeightStore:
    """``interface.WeightStore``; readers copy at once, so that it needs no reader leases."""

    def __init__(self, state: FakeRedisRun, config: WeightsConfig = WeightsConfig()) -> None:  # noqa: B008 - frozen
        self._state = state
        self._retention = Retention(max_bytes=config.budget_bytes, grace_s=config.grace_s)

    def publish(self, version: int, files: Sequence[NewFile], *, consumed: int, fence: int) -> None:
        state = self._state
        check_version(version, files)
        with state.lock:
            state.check_fence(fence)
            incoming_bytes = sum(len(file.payload) for file in files)
            for dropped in self._retention.to_drop(self.files(), incoming_bytes=incoming_bytes):
                del state.weight_files[dropped]
            if state.head is not None and version <= state.head:
                raise WeightsError(f"version {version} is not above the head {state.head}")
            base = base_of(files)
            if (state.limits is not None and not state.is_open) or (base is not None and base != state.head):
                raise LostDataError("the newest weights are gone")
            state.weight_files.update({file.available: file.payload for file in files})
            state.head = version
            state.consumed = max(state.consumed, consumed)

    def head(self) -> int | None:
        with self._state.lock:
            return self._state.head

    def wait_newer(self, than: int, *, timeout_s: float) -> int | None:
        deadline = time.monotonic() + timeout_s
        while True:
            head = self.head()
            if head is not None and head > than:
                return head
            if time.monotonic() >= deadline:
                return None
            time.sleep(_POLL_S)

    def files(self) -> tuple[Available, ...]:
        with self._state.lock:
            return tuple(sorted(self._state.weight_files, key=lambda file: (file.version, name_of(file))))

    def fetch(self, file: Available) -> bytes:
        with self._state.lock:
            if file not in self._state.weight_files:
                raise WeightsGoneError(f"{name_of(file)} is gone: the head is {self._state.head}")
            return self._state.weight_files[file]


class FakeRun:
    """Same shape as ``RedisRun``: one process of a run in memory."""

    def __init__(self, run_id: str = "fake", state: FakeRedisRun | None = None) -> None:
        self.shared = state or FakeRedisRun()
        self.seal = Seal(None, run_id=run_id)
        self._owner = uuid.uuid4().hex
        self.run_store = FakeRunStore(self.shared, self._owner, run_id)
        self.fleet = FakeFleet(self.shared)
        self.weights = FakeWeightStore(self.shared)
        self.canary = self.shared.canary

    def admission(self, actor_id: str) -> FakeAdmission:
        return FakeAdmission(self.shared, actor_id)

    def partials(self, actor_id: str) -> FakePartials:
        return FakePartials(self.shared, actor_id)

    def sink(self) -> FakeRolloutSink:
        return FakeRolloutSink(self.shared)

    def weights_for(self, config: WeightsConfig) -> FakeWeightStore:
        return FakeWeightStore(self.shared, config)

    def fleet_control(self, fence: int) -> FakeFleetControl:
        return FakeFleetControl(self.shared, fence)

    def source(self, fence: int, limits: RunLimits) -> FakeRolloutSource:
        return FakeRolloutSource(self.shared, self._owner, fence, limits)

    def close(self) -> None:
        """Nothing is open."""
