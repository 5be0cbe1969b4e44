"""Reads the rollout queue on a thread: what it read is durable before Redis is told, and before it is trained on."""

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence

from lambdapo_async.broker.interface import Delivery, RolloutSource
from lambdapo_async.config import RunConfig
from lambdapo_async.errors import BrokerError, BrokerUnavailable, LostDataError
from lambdapo_async.group_bytes import largest_group
from lambdapo_async.journal.receipts import NOT_COUNTED
from learner.arrivals import Arrival, Screen
from learner.hand_over import HandOver
from learner.receipt_book import ReceiptBook

logger = logging.getLogger(__name__)

_READ_WAIT_S = 0.5
_HAND_OVER_SHARE = 4
"""The hand-over may hold this part of what the replay queue may."""


class Ingest:
    """Reads, decodes, journals, commits and hands over, in this order; so a death anywhere loses nothing.

    consumes: deliveries    waits for: room in the hand-over    unblocks: actors, whose groups are durable now

    Backpressure needs no word: while nothing is taken nothing is read, Redis fills up, and its gate grants no lease.
    """

    def __init__(
        self,
        source: RolloutSource,
        book: ReceiptBook,
        screen: Screen,
        config: RunConfig,
        *,
        newest_version: Callable[[], int],
    ) -> None:
        self._source, self._book, self._screen, self._config = source, book, screen, config
        self._newest_version = newest_version
        max_bytes = config.replay.max_bytes // _HAND_OVER_SHARE
        self._hand_over = HandOver(max_bytes)
        self._read_at_once = max(1, min(config.rollout.groups_per_step, max_bytes // largest_group(config)))
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._read_until_stopped, name="ingest", daemon=True)

    def start(self) -> None:
        """Begin to read; the source must be initialised."""
        self._thread.start()

    def take(self, *, timeout_s: float) -> Arrival | None:
        """The next arrival in the journal's order, or None after ``timeout_s``.

        Raises:
            LostDataError, BrokerUnavailable: Redis lost data or is away: nothing is read until :meth:`go_on`.
        """
        return self._hand_over.take(timeout_s=timeout_s)

    def go_on(self) -> None:
        """The source was initialised again: read on."""
        self._hand_over.go_on()

    def close(self) -> None:
        """Stop reading; what was handed over and not taken is in the journal."""
        self._stopping.set()
        self._hand_over.close()
        if self._thread.is_alive():
            self._thread.join(timeout=2 * self._config.broker.timeout_s)

    def _read_until_stopped(self) -> None:
        try:
            while not self._stopping.is_set():
                try:
                    self._read()
                except (LostDataError, BrokerUnavailable) as error:
                    self._hand_over.pause(error)
        except BaseException as error:  # noqa: BLE001 - carried to the loop, which raises it
            self._hand_over.fail(error)

    def _read(self) -> None:
        deliveries = self._source.read(self._read_at_once, timeout_s=_READ_WAIT_S)
        if not deliveries:
            return
        # Redis may bring back what it had been told to forget.
        fresh = [delivery for delivery in deliveries if not self._book.is_known(delivery.descriptor)]
        arrivals = self._enter(fresh)
        try:
            self._commit(deliveries, arrivals)
        finally:
            # They are ours now, whatever Redis says: nobody would bring them again.
            for arrival in arrivals:
                self._hand_on(arrival)

    def _hand_on(self, arrival: Arrival) -> None:
        """Wait for room, and let the actors know meanwhile that this learner lives: it may be in a long step."""
        while not self._hand_over.put(arrival, timeout_s=self._config.broker.heartbeat_s):
            with contextlib.suppress(BrokerError):  # the next read finds it, too
                self._source.commit({})

    def _commit(self, deliveries: Sequence[Delivery], arrivals: Sequence[Arrival]) -> None:
        records = [arrival.record for arrival in arrivals]
        duplicates = {
            (record.descriptor.producer, record.descriptor.seq) for record in records if record.discarded in NOT_COUNTED
        }
        producers = {delivery.descriptor.producer for delivery in deliveries}
        self._source.commit(self._book.watermarks(producers), duplicates=duplicates)

    def _enter(self, deliveries: Sequence[Delivery]) -> list[Arrival]:
        newest_version = self._newest_version()
        verdicts = [self._screen.examine(delivery, newest_version=newest_version) for delivery in deliveries]
        for delivery, verdict in zip(deliveries, verdicts, strict=True):
            if verdict.problem:
                descriptor = delivery.descriptor
                logger.warning("quarantined group %d of %s: %s", descriptor.seq, descriptor.producer, verdict.problem)
                self._source.quarantine(descriptor, delivery.payload, verdict.problem)
        entered = self._book.enter([verdict.record for verdict in verdicts])
        return [
            self._screen.arrival(number, record, verdict.group)
            for (number, record), verdict in zip(entered, verdicts, strict=True)
        ]
