"""Brings Redis to agree with the learner: when a run opens, and whenever Redis lost something.

The learner's disk is the only truth (docs/decisions/0008). So it does not matter what Redis forgot, or to which moment
it went back: everything in it is compared with what is durable here, or written again.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from lambdapo_async.broker.interface import Phase, RolloutSource, RunStore
from lambdapo_async.errors import BrokerUnavailable, LostDataError
from learner.checkpoint import CheckpointStore
from learner.evaluation import Evaluation
from learner.ingest import Ingest
from learner.parallel import Ranks
from learner.publication import Publication
from learner.publisher import Publisher
from learner.receipt_book import ReceiptBook
from learner.versions import VersionCounter

logger = logging.getLogger(__name__)

R = TypeVar("R")

_LONGEST_PAUSE_S = 5.0
_CHECKED_EVERY_S = 10.0


@dataclass(slots=True, kw_only=True)
class Resync:
    """Knows everything that Redis has to hold. One thread, on rank 0."""

    checkpoints: CheckpointStore
    run_store: RunStore
    publication: Publication
    source: RolloutSource
    book: ReceiptBook
    publisher: Publisher
    versions: VersionCounter
    evaluation: Evaluation
    ingest: Ingest
    ranks: Ranks
    fence: int
    outage_s: float
    phase: Phase = "starting"
    """As the actors are to see it."""
    _next_check: float = field(default=0.0, init=False)

    def initialise(self, *, consumed: int) -> None:
        """Make run, queue, leases and counters agree with what is durable here.

        Args:
            consumed: training groups that the gate counts no more.

        Raises:
            FencedError: a later learner took over, whatever Redis remembers of it.
        """
        self.checkpoints.check_owner()
        self.run_store.take_over(fence=self.fence)
        if not self.publication.is_there():
            self.publication.write()
        self.source.initialise(self.book.durable(consumed=consumed))

    def check(self) -> None:
        """Notice the loss of what actors read and neither a read nor a commit touches: at most every ten seconds, and
        not beside a publish, which changes it.

        Raises:
            LostDataError: a part of the publication or of the weights is gone.
        """
        if time.monotonic() < self._next_check or self.publisher.is_publishing:
            return
        self._next_check = time.monotonic() + _CHECKED_EVERY_S
        if not self.publication.looks_whole():
            raise LostDataError("config, model files or rows are gone from Redis, or a part of them")
        if not self.publisher.is_out():
            raise LostDataError("the newest weights are gone from Redis, or a part of them")

    def show_life(self) -> None:
        """Let the actors know that a learner is at work, though it reads nothing; an outage is dealt with later."""
        with contextlib.suppress(BrokerUnavailable):
            self.run_store.take_over(fence=self.fence)

    def surely(self, ask: Callable[[], R], *, consumed: Callable[[], int], stopping: threading.Event) -> R:
        """What ``ask`` returns, once Redis is there and agrees with us.

        Args:
            ask: may be called again after an error of Redis.
            consumed: as in :meth:`initialise`, at that time.
            stopping: when it is set an outage is not waited for.

        Raises:
            BrokerUnavailable, LostDataError: it was not so for ``broker.outage_s`` altogether.
        """
        trouble = _Trouble(self.outage_s, stopping)
        while True:
            try:
                if trouble.began:
                    self._heal(consumed())
                    trouble.note_end()
                return ask()
            except (BrokerUnavailable, LostDataError) as error:
                trouble.note(error)
                self.ranks.pulse()

    def _heal(self, consumed: int) -> None:
        # A publish that still runs could reach a Redis that is ours again and lacks what its delta is made from.
        self.publisher.settle()
        self.initialise(consumed=consumed)
        if not self.publisher.is_out():
            version = self.versions.claim()
            self.publisher.republish(version, consumed=consumed)
            logger.info("published the newest weights again, as version %d", version)
        self.run_store.set_phase(self.phase, fence=self.fence)
        self.evaluation.ask_again()
        self.ingest.go_on()
        logger.info("Redis agrees with this learner's journal again")


class _Trouble:
    """How long Redis has been in trouble, and how long to wait before it is asked again.

    What counts is the time from each error until Redis agrees again: a call may wait for groups for much longer than an
    outage may last, and meet several.
    """

    def __init__(self, outage_s: float, stopping: threading.Event) -> None:
        self._outage_s, self._stopping = outage_s, stopping
        self._since: float | None = None
        self._before_s, self._pause_s = 0.0, 0.0
        self.began = False

    def note(self, error: BrokerUnavailable | LostDataError) -> None:
        now = time.monotonic()
        self.began = True
        self._since = now if self._since is None else self._since
        if self._before_s + now - self._since > self._outage_s or self._stopping.wait(self._pause_s):
            raise error
        logger.warning("%s; making it agree with this learner's journal", error)
        self._pause_s = min(max(0.1, 2 * self._pause_s), _LONGEST_PAUSE_S)

    def note_end(self) -> None:
        if self._since is not None:
            self._before_s += time.monotonic() - self._since
            self._since = None
