"""A batcher whose source is a list of deliveries."""

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from lambdapo_async.broker.interface import Delivery, Descriptor
from lambdapo_async.config import RunConfig
from lambdapo_async.journal.history import History
from lambdapo_async.journal.journal import Journal
from lambdapo_async.journal.receipts import Receipts
from lambdapo_async.journal.records import Record
from lambdapo_async.rollout import Lease, RolloutGroup
from lambdapo_async.wire import encode_group
from learner.arrivals import Screen
from learner.batcher import Batcher
from learner.evaluation import Evaluation
from learner.ingest import Ingest
from learner.pool import Pool, StepBatch
from learner.receipt_book import ReceiptBook
from tests.groups import VOCAB_SIZE

CONFIG = RunConfig.model_validate(
    {
        "model": {"path": "starter"},
        "task": {"kind": "arithmetic"},
        "rollout": {"group_size": 2, "groups_per_step": 2},
        "staleness": {"max_staleness": 1, "drop_above": 3},
        "learner": {"data_timeout_s": 5.0},
        "evaluation": {"every_steps": 5, "num_prompts": 2},
    }
)
NEVER = threading.Event()


def do_nothing() -> None:
    """While idle."""


class ListSource:
    """Delivers what it was given, then nothing."""

    def __init__(self, *deliveries: Delivery | Exception) -> None:
        self._deliveries = list(deliveries)
        self.released: list[int] = []
        self.quarantined: list[str] = []
        self.asked: list[Lease] = []
        self.committed: dict[str, int] = {}
        self.duplicates: set[tuple[str, int]] = set()
        self.empty = threading.Event()

    def read(self, max_groups: int, *, timeout_s: float) -> list[Delivery]:
        if not self._deliveries:
            self.empty.set()
            return []
        head = self._deliveries.pop(0)
        if isinstance(head, Exception):
            raise head
        return [head]

    def commit(self, watermarks: Mapping[str, int], *, duplicates: Collection[tuple[str, int]] = ()) -> None:
        self.committed.update(watermarks)
        self.duplicates |= set(duplicates)

    def release(self, consumed: int) -> None:
        self.released.append(consumed)

    def quarantine(self, descriptor: Descriptor, payload: bytes, reason: str) -> None:
        self.quarantined.append(reason)

    def request_evaluation(self, leases: Sequence[Lease]) -> None:
        self.asked.extend(leases)


def delivery(seq: int, group: RolloutGroup, *, payload: bytes | None = None, producer: str = "p") -> Delivery:
    content = encode_group(group) if payload is None else payload
    return Delivery(Descriptor(producer, seq, group.lease, group.min_version, len(content), 0.5), content)


class Bench:
    """A batcher on a list."""

    def __init__(
        self,
        folder: Path,
        *deliveries: Delivery | Exception,
        config: RunConfig = CONFIG,
        source: ListSource | None = None,
    ) -> None:
        self.config, self.folder = config, folder
        self.source = source or ListSource(*deliveries)
        self.journal = Journal.open(folder, 1)
        self.book = ReceiptBook(self.journal, Receipts())
        self.screen = Screen(config, vocab_size=VOCAB_SIZE)
        self.pool = Pool(config, self.screen)
        self.evaluation = Evaluation(self.source, config.evaluation, num_rows=10)  # type: ignore[arg-type]
        self.ingest = Ingest(self.source, self.book, self.screen, config, newest_version=lambda: 50)  # type: ignore[arg-type]
        self.batcher = Batcher(self.ingest, self.source, self.evaluation, self.pool, self.journal, config)  # type: ignore[arg-type]
        self.steps = 0
        self.ingest.start()

    def next_batch(
        self, version: int, stopping: threading.Event = NEVER, while_idle: Callable[[], None] = do_nothing
    ) -> StepBatch | None:
        batch = self.batcher.next_batch(self.steps + 1, version, stopping=stopping, while_idle=while_idle)
        self.steps += batch is not None
        return batch

    def records(self) -> list[Record]:
        return [record for _, record in History.find(self.folder).read(1)]

    def close(self) -> None:
        self.ingest.close()
        self.journal.close()


def indices(batch: StepBatch | None) -> list[int]:
    assert batch is not None
    return [received.group.lease.index for received in batch.groups]
