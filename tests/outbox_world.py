"""A run in memory, its learner, and outboxes on a disk that may be orphaned."""

import os
from pathlib import Path

from actors.outbox import Outbox
from actors.spool import Spool
from lambdapo_async.broker.interface import RolloutSource
from lambdapo_async.broker.limits import RunLimits
from lambdapo_async.wire import decode_group
from tests.contract.broker_world import durable
from tests.fakes_broker import FakeRun

LIMITS = RunLimits(
    max_staleness=9, groups_per_step=9, max_groups=90, max_bytes=10**6, group_bytes=2_000, lease_s=60.0
)  # fmt: skip


class World:
    """A run in memory and its learner, who may forget nothing; Redis may."""

    def __init__(self, tmp_path: Path) -> None:
        self.run = FakeRun("run")
        self.root = tmp_path
        self.received: list[int] = []
        self.marks: dict[str, int] = {}
        self.source = self.learner(fence=1)

    def learner(self, *, fence: int) -> RolloutSource:
        self.run.run_store.create(b"{}", {}, fence=fence)
        source = self.run.source(fence, LIMITS)
        source.initialise(durable(dict(self.marks)))
        self.run.run_store.set_phase("running", fence=fence)
        return source

    def outbox(self, producer: str = "a.0") -> Outbox:
        return Outbox(
            self.run.sink(), Spool.create(self.root, producer), epoch=self.run.run_store.state().epoch, outage_s=5.0
        )

    def orphans(self) -> list[Outbox]:
        epoch = self.run.run_store.state().epoch
        return [Outbox.adopted(self.run.sink(), spool, epoch=epoch, outage_s=5.0) for spool in Spool.adopt(self.root)]

    def read(self) -> None:
        """The learner journals all there is."""
        for delivery in self.source.read(90, timeout_s=0.001):
            group = decode_group(delivery.payload, vocab_size=1000, max_version=100)
            assert group.lease == delivery.descriptor.lease
            self.received.append(group.lease.index)
            self.marks[delivery.descriptor.producer] = delivery.descriptor.seq

    def commit(self) -> None:
        self.read()
        self.source.commit(self.marks)

    def lose_everything(self) -> None:
        """An empty Redis, which the learner fills again."""
        for name, value in vars(type(self.run.shared)()).items():
            if name not in ("lock", "canary"):
                setattr(self.run.shared, name, value)
        self.source = self.learner(fence=1)


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*.group"))


def abandon(outbox: Outbox) -> None:
    """What a kill leaves: the files, without their lock."""
    os.close(outbox._spool._lock)
