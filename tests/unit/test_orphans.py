"""What dead actors left is sent by a living one, whom their trouble does not touch."""

import asyncio
import glob
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import pytest

from actors.actor import Actor
from actors.orphans import Orphans
from actors.outbox import Outbox
from actors.spool import Spool
from lambdapo_async.broker.interface import Delivery, EnqueueReply, EnqueueStatus, Marks
from lambdapo_async.errors import BrokerError
from lambdapo_async.wire import encode_group
from tests.actor_stage import TIMEOUT_S, Stage, acting
from tests.groups import make_group


class PartialSink:
    """Takes and commits at once what is offered, but refuses the groups of some."""

    def __init__(self, refused: Collection[str], status: EnqueueStatus = EnqueueStatus.FULL) -> None:
        self.refused, self._status = set(refused), status
        self.taken: dict[str, int] = {}

    def enqueue(self, deliveries: Sequence[Delivery], *, epoch: str) -> EnqueueReply:
        descriptor = deliveries[-1].descriptor
        last = self.taken.get(descriptor.producer, 0)
        if descriptor.producer in self.refused:
            return EnqueueReply(self._status, last, last, epoch)
        self.taken[descriptor.producer] = descriptor.seq
        return EnqueueReply(EnqueueStatus.OK, descriptor.seq, descriptor.seq, epoch)

    def marks(self, producer: str) -> Marks:
        last = self.taken.get(producer, 0)
        return Marks(is_open=True, last=last, committed=last, epoch="epoch")


def die(root: Path, producer: str, *, num_groups: int = 1) -> None:
    """Leave groups behind."""
    spool = Spool.create(root, producer)
    for seq in range(1, num_groups + 1):
        spool.write(seq, encode_group(make_group(100 + seq)))
    spool.close()


def adopt(root: Path, sink: PartialSink, *, outage_s: float) -> tuple[Outbox, ...]:
    return tuple(Outbox.adopted(sink, spool, epoch="epoch", outage_s=outage_s) for spool in Spool.adopt(root))


def files(root: Path) -> list[str]:
    """What is left; a folder may go while it is listed, which ``Path.rglob`` does not take."""
    return sorted(glob.glob("*/*.group", root_dir=root))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("outage_s", [0.01, 3600.0])
@pytest.mark.parametrize("status", [EnqueueStatus.FULL, EnqueueStatus.EPOCH, EnqueueStatus.WAIT])
async def test_one_that_is_refused_holds_up_no_other(tmp_path: Path, status: EnqueueStatus, outage_s: float) -> None:
    for producer in ("a.0", "b.0", "c.0"):
        die(tmp_path, producer, num_groups=2)
    sink = PartialSink(("a.0", "b.0"), status)
    orphans = Orphans(adopt(tmp_path, sink, outage_s=outage_s), beat_s=0.001)
    sending = asyncio.ensure_future(orphans.send())
    await until(lambda: sink.taken == {"c.0": 2})
    sink.refused.discard("b.0")
    await until(lambda: sink.taken == {"b.0": 2, "c.0": 2})
    await until(lambda: files(tmp_path) == ["a.0/1.group", "a.0/2.group"])
    assert not sending.done()
    sending.cancel()
    await asyncio.wait([sending])
    await orphans.close(is_run_finished=False)
    assert files(tmp_path) == ["a.0/1.group", "a.0/2.group"]


async def test_what_befalls_one_is_told_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Refusal(PartialSink):
        def enqueue(self, deliveries: Sequence[Delivery], *, epoch: str) -> EnqueueReply:
            if deliveries[0].descriptor.producer in self.refused:
                raise BrokerError("group train-101 has 9 bytes, more than all of broker.max_bytes: raise it")
            return super().enqueue(deliveries, epoch=epoch)

    die(tmp_path, "a.0", num_groups=2)
    sink = Refusal({"a.0"})
    orphans = Orphans(adopt(tmp_path, sink, outage_s=1.0), beat_s=0.001)
    sending = asyncio.ensure_future(orphans.send())
    await until(lambda: orphans.failures >= 2)
    assert "2 groups of a.0, which died, are not sent yet: group train-101 has 9 bytes" in caplog.text
    assert orphans.unconfirmed == 2
    sink.refused.clear()
    await asyncio.wait_for(sending, TIMEOUT_S)
    assert (orphans.unconfirmed, list(tmp_path.iterdir())) == (0, [])


async def test_a_spool_that_cannot_be_read_is_told_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    die(tmp_path, "a.0")
    orphans = Orphans(adopt(tmp_path, PartialSink(()), outage_s=1.0), beat_s=0.001)
    (tmp_path / "a.0" / "1.group").unlink()
    (tmp_path / "a.0" / "folder").mkdir()  # neither can its spool be given up
    sending = asyncio.ensure_future(orphans.send())
    await until(lambda: orphans.failures > 0)
    sending.cancel()
    await asyncio.wait([sending])
    failures = orphans.failures
    await orphans.close(is_run_finished=False)
    assert orphans.failures == failures + 1
    assert "No such file" in caplog.text


@pytest.mark.parametrize("outage_s", [0.01, 3600.0])
async def test_a_living_actor_sees_its_own_groups_confirmed_beside_a_refused_orphan(
    tmp_path: Path, outage_s: float
) -> None:
    stage = Stage(tmp_path)
    die(stage.spools, "dead.0")
    stage.orphans = adopt(stage.spools, PartialSink({"dead.0"}), outage_s=outage_s)
    stage.actor = Actor(stage.parts())
    stage.open()
    async with acting(stage) as task:
        await stage.take(8)
        stage.source.commit({"a.0": 8})
        await stage.until(lambda: not list((stage.spools / "a.0").glob("?.group")))
        if outage_s < 1:
            await stage.until(lambda: stage.run.fleet.members()[0].counters["orphan_failures"] >= 2)
        assert stage.run.fleet.members()[0].counters["groups_adopted"] == 1
        stage.actor.drain()
        await asyncio.wait_for(task, TIMEOUT_S)
    assert "dead.0/1.group" in files(stage.spools)
