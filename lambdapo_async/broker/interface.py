"""What the processes ask of Redis: the seams, each with a Redis side, a fake and one contract suite.

All calls block with a deadline (``broker.timeout_s``) and raise ``BrokerUnavailable`` after it; an asyncio
caller uses ``asyncio.to_thread``. Life of a group: leased -> sampled -> enqueued -> read -> journaled -> committed
(gone from Redis and from its actor) -> trained (or discarded, counted).

The learner's durable state is the only truth. Redis may lose, roll back or forget anything: it is made to agree.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Protocol

from lambdapo_async.broker.heartbeat import Heartbeat
from lambdapo_async.rollout import Lease, Split
from lambdapo_async.weights.catch_up import Available
from lambdapo_async.weights.manifest import NewFile
from lambdapo_async.weights.tensor_file import Payload

Phase = Literal["starting", "running", "finished"]


class EnqueueStatus(StrEnum):
    """The queue's answer to an offer."""

    OK = "OK"
    DUP = "DUP"
    """This sequence number is already in: go on with the next."""
    GAP = "GAP"
    """Redis lost earlier ones: offer again from ``last + 1``."""
    FULL = "FULL"
    """No room in groups or bytes: wait and offer again. An answer to a lease that Redis knows always has room,
    unless the server evicts what it is given."""
    EPOCH = "EPOCH"
    """Redis came back empty and its learner filled it anew: offer again from ``committed + 1``."""
    WAIT = "WAIT"
    """Redis restarted and its learner has not come back to it yet: nothing is accepted until then."""
    LATE = "LATE"
    """Refused for good: the lease had expired and another actor holds or answered the prompt; the number is free."""


@dataclass(frozen=True, slots=True)
class EnqueueReply:
    """The queue's answer and what it knows of this producer."""

    status: EnqueueStatus
    last: int
    """Last sequence number accepted from this producer; 0 before the first."""
    committed: int
    """Last sequence number that is durable at the learner."""
    epoch: str
    """The queue's epoch now; use it in the next offer."""


@dataclass(frozen=True, slots=True)
class Marks:
    """What the queue knows of a producer."""

    is_open: bool
    """Whether offers are accepted: the learner has initialised this incarnation of the server."""
    last: int
    """Last sequence number accepted; less than before when Redis lost groups."""
    committed: int
    """Last sequence number that is durable at the learner."""
    epoch: str


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A group's entry in the stream; the payload lies beside it."""

    producer: str
    seq: int
    """Consecutive per producer, from 1."""
    lease: Lease
    min_version: int
    num_bytes: int
    mean_reward: float


@dataclass(frozen=True, slots=True)
class Delivery:
    """One group, as it is offered and as it is read."""

    descriptor: Descriptor
    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Durable:
    """What the learner holds durably; Redis is made to agree with it."""

    watermarks: Mapping[str, int]
    """Producer -> last sequence number journaled."""
    consumed: int
    """Training groups trained or discarded; duplicates are not counted."""
    waiting: int
    """Training groups received and not consumed: at the learner, gone from Redis."""
    next_index: int
    """Training indices below it were leased at some time, as far as the learner knows."""
    holes: tuple[int, ...]
    """Training indices below ``next_index`` of which no group was received, ascending."""


@dataclass(frozen=True, slots=True)
class QueueStats:
    """Depths right now; and counts since this Redis was empty."""

    queued: int
    """Groups in Redis, read but uncommitted ones included."""
    num_bytes: int
    leased: int
    """Leases held by actors."""
    returned: int
    """Leases handed back or expired, waiting to be granted again."""
    admitted: int
    """Training leases granted and not consumed: leased, returned, queued or at the learner."""
    quarantined: int
    """Groups kept aside because they could not be read."""
    full: int
    """Offers refused because the queue had no room; each is repeated."""
    late: int
    """Groups refused for good: another actor holds or answered their prompt."""
    expired: int
    """Leases that were not renewed in time; others got them."""


@dataclass(frozen=True, slots=True)
class RunState:
    """The run as its actors see it."""

    phase: Phase
    epoch: str
    version: int
    """Newest policy version published; -1 before the first."""
    schema: int
    learner_silent_s: float
    """Since the learner's last sign of life, by the server's clock."""


class Admission(Protocol):
    """Grants prompts to actors, so that staleness and memory are bounded before anything is sampled."""

    def lease(self, max_count: int) -> tuple[Lease, ...]:
        """At most ``max_count`` leases: held-out ones first, then returned ones, then new ones.

        Training leases are granted while admitted < (max_staleness + 1) * groups_per_step; empty means the
        gate is closed, the queue has no room for one answer more, or the run is not ``running``.
        """

    def renew(self, leases: Sequence[Lease]) -> tuple[Lease, ...]:
        """Push the expiry of held leases; returns those that are no longer ours."""

    def hand_back(self, leases: Sequence[Lease]) -> None:
        """Give leases up unanswered; they are granted next."""


class RolloutSink(Protocol):
    """The actor's end of the queue: one outstanding offer per producer."""

    def enqueue(self, deliveries: Sequence[Delivery], *, epoch: str) -> EnqueueReply:
        """Offer consecutive groups of one producer, each any number of times.

        The answer is to the last one, or to the first that was refused, and those behind it with it.
        """

    def marks(self, producer: str) -> Marks:
        """What the queue knows of ``producer``: asked while there is nothing to offer, or offers are refused."""


class RolloutSource(Protocol):
    """The learner's end of the queue. Every call is fenced: ``FencedError`` once another learner came."""

    def initialise(self, durable: Durable) -> None:
        """Make Redis agree with ``durable``, and read from the start. Idempotent; may be called at any time.

        What is durable goes, lost holes return to the front of the line, every counter is counted anew. Held-out
        leases that wait in line are forgotten: request them again.
        """

    def read(self, max_groups: int, *, timeout_s: float) -> list[Delivery]:
        """Groups not read before, oldest first; waits for the first one, empty after ``timeout_s``.

        Raises:
            LostDataError: Redis restarted, went back, or lost an entry or a payload: ``initialise`` before going on.
        """

    def release(self, consumed: int) -> None:
        """Raise the consumed count, so that the gate opens for groups that were discarded."""

    def commit(self, watermarks: Mapping[str, int], *, duplicates: Collection[tuple[str, int]] = ()) -> None:
        """Delete everything up to the marks: it is durable at the learner. Idempotent.

        Args:
            watermarks: producer -> last sequence number journaled.
            duplicates: (producer, sequence number) of training groups among them whose index was received before;
                they leave the gate's count with their entry, because they will never be consumed.

        Raises:
            LostDataError: as :meth:`read`; nothing was deleted.
        """

    def quarantine(self, descriptor: Descriptor, payload: bytes, reason: str) -> None:
        """Keep an unreadable group aside (bounded, counted)."""

    def request_evaluation(self, leases: Sequence[Lease]) -> None:
        """Offer held-out leases to the actors, ahead of training ones."""

    def stats(self) -> QueueStats:
        """Depths right now, and what happened so far."""


class Fleet(Protocol):
    """Who is there."""

    def beat(self, heartbeat: Heartbeat) -> bool:
        """Say that we live; True while the learner has set us aside (see ``fleet_control``)."""

    def members(self) -> tuple[Heartbeat, ...]:
        """Actors whose last heartbeat is younger than ``broker.lease_s``; unreadable records are left out."""

    def leave(self, actor_id: str) -> None:
        """Sign off after a drain."""


class RunStore(Protocol):
    """What an actor needs to join: config, model files (no weights), rows, phase."""

    def take_over(self, *, fence: int) -> None:
        """Own the run before anything is loaded: no older learner can commit then; ``FencedError`` if a newer does."""

    def create(self, config_json: bytes, model_files: Mapping[str, bytes], *, fence: int) -> None:
        """Publish config and model files; ``FencedError`` if a newer learner owns the run id."""

    def put_rows(self, split: Split, rows: Sequence[Mapping[str, str | None]]) -> None:
        """Publish a split's rows in chunks."""

    def config_json(self) -> bytes:
        """The published config; ``RunNotFoundError`` when there is none or its schema is unknown."""

    def model_files(self) -> dict[str, bytes]:
        """File name -> content: config.json, tokenizer and generation config; ``RunNotPublishedError`` without any."""

    def num_rows(self, split: Split) -> int:
        """Rows of a split."""

    def row(self, split: Split, index: int) -> Mapping[str, str | None]:
        """One row; chunks are cached. ``RunNotFoundError`` when Redis lost the rows."""

    def is_published(self, *, num_files: int, num_rows: Mapping[Split, int]) -> bool:
        """Whether config, so many model files and so many rows are there: by their numbers alone, in one round trip."""

    def state(self) -> RunState:
        """Phase, epoch and version; ``RunNotFoundError`` when the run is not in this Redis."""

    def set_phase(self, phase: Phase, *, fence: int) -> None:
        """``running`` once the first weights are out; ``finished`` tells the actors to drain and exit 0."""


class WeightStore(Protocol):
    """Versions of the policy as files: seen whole or not at all, checksummed (docs: weights)."""

    def publish(self, version: int, files: Sequence[NewFile], *, consumed: int, fence: int) -> None:
        """Write all files that lead to ``version``, then list them and move the head, in one moment.

        First whatever nobody needs any more is deleted, as far as nobody reads it and within the byte budget.
        ``consumed`` is raised with the head: the gate opens for the groups of this step.

        Raises:
            WeightsError: the version is not above the head, or the byte budget is too small.
            LostDataError: the version that the files lead from is not the head any more, or the server restarted.
            FencedError: another learner owns the run.
        """

    def head(self) -> int | None:
        """Newest whole version; None before the first."""

    def wait_newer(self, than: int, *, timeout_s: float) -> int | None:
        """The head as soon as it is above ``than``; None after ``timeout_s``."""

    def files(self) -> tuple[Available, ...]:
        """Every file that can be fetched now, by version: steps, unions and keyframes; none before the first."""

    def lost(self) -> tuple[Available, ...]:
        """Those of :meth:`files` of which Redis lost a part; to be asked by the publisher, while it publishes nothing.

        The next :meth:`publish` takes them off the list.
        """

    def fetch(self, file: Available) -> Payload:
        """One file's bytes as published, verified.

        Raises:
            WeightsGoneError: it is not there any more.
            WeightsLostError: it is on the list, and Redis lost a part of it: the publisher will notice.
            WeightsError: it is damaged.
        """
