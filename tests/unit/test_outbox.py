"""The outbox: consecutive numbers, one offer at a time, kept on the disk until the learner has it."""

import asyncio
import gc
import os
import tempfile
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.outbox import Outbox
from actors.spool import Spool
from lambdapo_async.broker.interface import Descriptor, EnqueueReply, EnqueueStatus, Marks, RolloutSource
from lambdapo_async.broker.limits import RunLimits
from lambdapo_async.errors import BrokerUnavailable
from lambdapo_async.wire import decode_group
from tests.contract.broker_world import durable
from tests.fakes_broker import FakeRun
from tests.groups import make_group

OK, DUP, GAP, FULL, EPOCH, WAIT, LATE = EnqueueStatus
LIMITS = RunLimits(
    max_staleness=9, groups_per_step=9, max_groups=90, max_bytes=10**6, group_bytes=2_000, lease_s=60.0
)  # fmt: skip


class ScriptedSink:
    """Answers with the given statuses, then OK; records every offer."""

    def __init__(self, *statuses: EnqueueStatus) -> None:
        self._statuses = list(statuses)
        self.offers: list[tuple[str, int, str, int]] = []
        self.gate = threading.Event()
        self.gate.set()

    def enqueue(self, descriptor: Descriptor, payload: bytes, *, epoch: str) -> EnqueueReply:
        assert self.gate.wait(10)
        group = decode_group(payload, vocab_size=1000, max_version=100)
        assert (group.lease, len(payload)) == (descriptor.lease, descriptor.num_bytes)
        self.offers.append((descriptor.producer, descriptor.seq, epoch, descriptor.lease.index))
        status = self._statuses.pop(0) if self._statuses else OK
        last = descriptor.seq if status in (OK, DUP) else 0 if status is GAP else descriptor.seq - 1
        return EnqueueReply(status, last, 0, "epoch-2" if status is EPOCH else epoch)

    def marks(self, producer: str) -> Marks:
        raise NotImplementedError


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


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def outbox_on(sink: ScriptedSink, folder: Path, *, outage_s: float = 60.0) -> Outbox:
    return Outbox(sink, Spool.create(folder, "p.0"), epoch="epoch-1", outage_s=outage_s)


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*.group"))


async def test_numbers_are_consecutive_and_repeated_until_accepted(tmp_path: Path) -> None:
    sink = ScriptedSink(OK, FULL, WAIT, DUP, LATE)
    outbox = outbox_on(sink, tmp_path)
    for index in range(4):
        await outbox.send(make_group(index))
    assert [(seq, index) for _, seq, _, index in sink.offers] == [(1, 0), (2, 1), (2, 1), (2, 1), (3, 2), (3, 3)]
    assert (outbox.sent, outbox.late, outbox.unconfirmed) == (3, 1, 3)
    assert files(tmp_path) == ["p.0/1.group", "p.0/2.group", "p.0/3.group"]


async def test_groups_behind_a_late_one_move_up_before_they_are_offered(tmp_path: Path) -> None:
    sink = ScriptedSink(OK, LATE)
    sink.gate.clear()
    outbox = outbox_on(sink, tmp_path)
    sends = [asyncio.ensure_future(outbox.send(make_group(index))) for index in range(4)]
    while len(files(tmp_path)) < 4:
        await asyncio.sleep(0.001)
    sink.gate.set()
    await asyncio.gather(*sends)
    assert [(seq, index) for _, seq, _, index in sink.offers] == [(1, 0), (2, 1), (2, 2), (3, 3)]
    assert files(tmp_path) == ["p.0/1.group", "p.0/2.group", "p.0/3.group"]


@pytest.mark.parametrize(("status", "epoch"), [(GAP, "epoch-1"), (EPOCH, "epoch-2")])
async def test_what_redis_lost_is_offered_again_under_its_number(
    tmp_path: Path, status: EnqueueStatus, epoch: str
) -> None:
    class Forgetful(ScriptedSink):
        def enqueue(self, descriptor: Descriptor, payload: bytes, *, epoch: str) -> EnqueueReply:
            reply = super().enqueue(descriptor, payload, epoch=epoch)
            return EnqueueReply(reply.status, 1, 0, reply.epoch) if reply.status is status else reply

    sink = Forgetful(OK, OK, OK, status)
    outbox = outbox_on(sink, tmp_path)
    for index in range(4):
        await outbox.send(make_group(index))
    assert [(seq, index) for _, seq, _, index in sink.offers[4:]] == [(2, 1), (3, 2), (4, 3)]
    assert {(producer, epoch) for producer, _, epoch, _ in sink.offers[4:]} == {("p.0", epoch)}
    assert (outbox.sent, outbox.restarts) == (4, 1)


@pytest.mark.parametrize("status", [FULL, WAIT])
async def test_a_queue_that_refuses_for_too_long_is_an_error(tmp_path: Path, status: EnqueueStatus) -> None:
    sink = ScriptedSink(*[status] * 10)
    with pytest.raises(BrokerUnavailable, match=f"answered {status} for"):
        await outbox_on(sink, tmp_path, outage_s=0.05).send(make_group())
    assert files(tmp_path) == ["p.0/1.group"]


async def test_a_cancelled_sender_leaves_no_number_in_doubt(tmp_path: Path) -> None:
    sink = ScriptedSink()
    sink.gate.clear()
    outbox = outbox_on(sink, tmp_path)
    first = asyncio.ensure_future(outbox.send(make_group(0)))
    while not outbox._one_offer.locked():
        await asyncio.sleep(0.001)
    first.cancel()
    second = asyncio.ensure_future(outbox.send(make_group(1)))
    sink.gate.set()
    await second
    assert [(seq, index) for _, seq, _, index in sink.offers] == [(1, 0), (2, 1)]


async def test_a_failure_that_its_cancelled_sender_will_not_hear_is_told_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unheard: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
    sink = ScriptedSink(*[WAIT] * 1000)
    outbox = outbox_on(sink, tmp_path, outage_s=0.05)
    sender = asyncio.ensure_future(outbox.send(make_group()))
    while not sink.offers:
        await asyncio.sleep(0.001)
    sender.cancel()
    await asyncio.wait([sender])
    while outbox._one_offer.locked():
        await asyncio.sleep(0.001)
    await asyncio.sleep(0)
    gc.collect()
    assert unheard == []
    assert "a group was not delivered: the rollout queue answered WAIT" in caplog.text
    assert files(tmp_path) == ["p.0/1.group"]


async def test_concurrent_senders_offer_one_by_one(tmp_path: Path) -> None:
    sink = ScriptedSink()
    outbox = outbox_on(sink, tmp_path)
    await asyncio.gather(*(outbox.send(make_group(index)) for index in range(20)))
    assert [seq for _, seq, _, _ in sink.offers] == list(range(1, 21))


async def test_a_group_is_kept_until_the_learner_has_it(world: World) -> None:
    outbox = world.outbox()
    for index in range(3):
        await outbox.send(make_group(index))
    await outbox.poll()
    assert outbox.unconfirmed == 3
    world.commit()
    await outbox.poll()
    assert (outbox.unconfirmed, files(world.root)) == (0, [])
    await outbox.close(is_run_finished=False)
    assert list(world.root.iterdir()) == []


async def test_an_idle_actor_notices_that_redis_lost_its_groups(world: World) -> None:
    outbox = world.outbox()
    for index in range(4):
        await outbox.send(make_group(index))
        if index == 1:
            world.commit()
    world.lose_everything()
    await outbox.poll()
    world.commit()
    assert world.received == [0, 1, 2, 3]
    assert outbox.restarts == 1
    # A group that the learner journaled but could not commit is not offered again.
    await outbox.send(make_group(4))
    world.read()
    world.lose_everything()
    await outbox.poll()
    world.commit()
    assert world.received == [0, 1, 2, 3, 4]
    assert outbox.unconfirmed == 0


async def test_nothing_is_offered_to_a_server_that_waits_for_its_learner(world: World) -> None:
    outbox = world.outbox()
    await outbox.send(make_group(0))
    world.run.shared.restart()
    await outbox.poll()
    assert outbox.unconfirmed == 1
    world.source = world.learner(fence=1)
    world.commit()
    await outbox.poll()
    assert (outbox.unconfirmed, world.received) == (0, [0])


async def test_the_next_actor_sends_what_a_dead_one_left(world: World) -> None:
    world.run.admission("a").lease(4)
    dead = world.outbox()
    for index in range(4):
        await dead.send(make_group(index))
        if index == 0:
            world.commit()
    # Killed: nothing but the disk is left; and Redis loses what it had.
    abandon(dead)
    world.lose_everything()
    (orphan,) = world.orphans()
    await orphan.poll()
    assert orphan.unconfirmed == 3
    world.commit()
    await orphan.poll()
    assert (orphan.unconfirmed, world.received) == (0, [0, 1, 2, 3])
    await orphan.close(is_run_finished=False)
    assert list(world.root.iterdir()) == []


async def test_a_dead_actors_group_is_dropped_when_somebody_else_answers_its_prompt(world: World) -> None:
    dead = world.outbox()
    for index in (7, 8):
        await dead.send(make_group(index))
    abandon(dead)
    world.lose_everything()
    other = world.outbox("b.0")
    await other.send(make_group(7))
    (orphan,) = world.orphans()
    await orphan.poll()
    world.commit()
    assert (world.received, world.marks) == ([7, 8], {"b.0": 1, "a.0": 1})


async def test_the_spool_of_a_living_actor_is_not_touched(world: World) -> None:
    living = world.outbox()
    await living.send(make_group(0))
    assert world.orphans() == []


async def test_a_damaged_file_is_left_out(world: World) -> None:
    dead = world.outbox()
    await dead.send(make_group(0))
    abandon(dead)
    (world.root / "a.0" / "2.group").write_bytes(b"damaged")
    (orphan,) = world.orphans()
    assert orphan.unconfirmed == 1


async def test_a_finished_run_leaves_nothing_on_the_disk(world: World) -> None:
    outbox = world.outbox()
    await outbox.send(make_group(0))
    await outbox.close(is_run_finished=True)
    assert list(world.root.iterdir()) == []


async def test_unconfirmed_groups_stay_on_the_disk(world: World, caplog: pytest.LogCaptureFixture) -> None:
    outbox = world.outbox()
    await outbox.send(make_group(0))
    await outbox.close(is_run_finished=False)
    assert files(world.root) == ["a.0/1.group"]
    assert "1 groups are not confirmed" in caplog.text


async def test_numbers_that_nobody_has_any_more_need_a_new_producer(world: World) -> None:
    outbox = world.outbox()
    for index in range(3):
        await outbox.send(make_group(index))
        if index == 1:
            world.commit()
            await outbox.poll()
    # Redis and the learner's disk are gone; a new learner starts under the old run id.
    world.marks = {}
    world.lose_everything()
    outbox._outage_s = 0.01
    await outbox.poll()
    world.commit()
    assert world.marks == {"a.1": 1}
    assert world.received == [0, 1, 2]
    await outbox.send(make_group(3))
    world.commit()
    assert world.marks == {"a.1": 2}
    assert files(world.root) == ["a.1/2.group"]


class Life:
    """One actor after the other on the same machine, and everything that can happen to them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.lives, self.sent = 1, 0
        self.outboxes = [world.outbox("a0.0")]

    async def send(self) -> None:
        await self.outboxes[-1].send(make_group(self.sent))
        self.sent += 1

    async def read(self) -> None:
        self.world.read()

    async def commit(self) -> None:
        self.world.commit()

    async def poll(self) -> None:
        await self.outboxes[0].poll()

    async def restart(self) -> None:
        self.world.run.shared.restart()
        self.world.source = self.world.learner(fence=1)

    async def lose_everything(self) -> None:
        self.world.lose_everything()

    async def kill(self) -> None:
        for outbox in self.outboxes:
            abandon(outbox)
        self.outboxes = [*self.world.orphans(), self.world.outbox(f"a{self.lives}.0")]
        self.lives += 1

    async def live_through(self, events: list[Callable[["Life"], Awaitable[None]]]) -> None:
        for event in events:
            await event(self)
        while any(outbox.unconfirmed for outbox in self.outboxes):
            for outbox in self.outboxes:
                await outbox.poll()
            self.world.commit()
        for outbox in self.outboxes:
            await outbox.close(is_run_finished=False)


EVENTS = (Life.send, Life.send, Life.read, Life.commit, Life.poll, Life.restart, Life.lose_everything, Life.kill)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(EVENTS), max_size=40))
def test_whatever_happens_every_group_is_journaled_once(events: list[Callable[[Life], Awaitable[None]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        life = Life(World(Path(folder)))
        asyncio.run(life.live_through(events))
        assert sorted(life.world.received) == list(range(life.sent))
        assert files(life.world.root) == []


def abandon(outbox: Outbox) -> None:
    """What a kill leaves: the files, without their lock."""
    os.close(outbox._spool._lock)
