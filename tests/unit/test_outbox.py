"""The outbox: consecutive numbers, one offer at a time, each repeated until it is accepted."""

import asyncio
import gc
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from actors.outbox import AT_ONCE, Outbox
from actors.spool import Spool
from lambdapo_async.broker.interface import Delivery, EnqueueReply, EnqueueStatus, Marks
from lambdapo_async.errors import BrokerUnavailable, ConfigError
from lambdapo_async.rollout import RolloutGroup
from lambdapo_async.wire import decode_group, encode_group
from tests.groups import make_group
from tests.outbox_world import files

OK, DUP, GAP, FULL, EPOCH, WAIT, LATE = EnqueueStatus


class ScriptedSink:
    """Answers with the given statuses, a group each, then OK; records every group up to the first refusal."""

    def __init__(self, *statuses: EnqueueStatus) -> None:
        self._statuses = list(statuses)
        self.offers: list[tuple[str, int, str, int]] = []
        self.sizes: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    def enqueue(self, deliveries: Sequence[Delivery], *, epoch: str) -> EnqueueReply:
        assert self.gate.wait(10)
        self.sizes.append(len(deliveries))
        for each in deliveries:
            descriptor = each.descriptor
            group = decode_group(each.payload, vocab_size=1000, max_version=100)
            assert (group.lease, len(each.payload)) == (descriptor.lease, descriptor.num_bytes)
            self.offers.append((descriptor.producer, descriptor.seq, epoch, descriptor.lease.index))
            status = self._statuses.pop(0) if self._statuses else OK
            last = descriptor.seq if status in (OK, DUP) else 0 if status is GAP else descriptor.seq - 1
            if status not in (OK, DUP):
                break
        return EnqueueReply(status, last, 0, "epoch-2" if status is EPOCH else epoch)

    def marks(self, producer: str) -> Marks:
        return Marks(is_open=True, last=0, committed=0, epoch="epoch-1")


def outbox_on(sink: ScriptedSink, folder: Path, *, outage_s: float = 60.0) -> Outbox:
    return Outbox(sink, Spool.create(folder, "p.0"), epoch="epoch-1", outage_s=outage_s)


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
        def enqueue(self, deliveries: Sequence[Delivery], *, epoch: str) -> EnqueueReply:
            reply = super().enqueue(deliveries, epoch=epoch)
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


async def sent_at_once(outbox: Outbox, sink: ScriptedSink, groups: Sequence[RolloutGroup]) -> None:
    """All wait behind the first offer."""
    sink.gate.clear()
    sends = [asyncio.ensure_future(outbox.send(group)) for group in groups]
    while outbox.unconfirmed < len(groups):
        await asyncio.sleep(0.001)
    sink.gate.set()
    await asyncio.gather(*sends)


async def test_those_that_wait_go_together_in_order(tmp_path: Path) -> None:
    sink = ScriptedSink()
    outbox = outbox_on(sink, tmp_path)
    await sent_at_once(outbox, sink, [make_group(index) for index in range(20)])
    assert [seq for _, seq, _, _ in sink.offers] == list(range(1, 21))
    assert sink.sizes[0] + sink.sizes[1] == 20
    assert (outbox.sent, len(sink.sizes)) == (20, 2)


async def test_one_offer_has_so_many_groups_and_bytes(tmp_path: Path) -> None:
    sink = ScriptedSink()
    small, large = [make_group(index) for index in range(100)], make_group(100, num_tokens=300_000)
    outbox = outbox_on(sink, tmp_path)
    await sent_at_once(outbox, sink, [*small, large, large, large])
    assert max(sink.sizes) == AT_ONCE
    assert sink.sizes[-3:] == [1, 1, 1]  # one alone is larger than what goes at once
    assert [seq for _, seq, _, _ in sink.offers] == list(range(1, 104))


async def test_a_full_queue_is_offered_one_then_two_then_four(tmp_path: Path) -> None:
    sink = ScriptedSink(OK, FULL, FULL, FULL)
    outbox = outbox_on(sink, tmp_path)
    await sent_at_once(outbox, sink, [make_group(index) for index in range(9)])
    assert [seq for _, seq, _, _ in sink.offers] == [1, 2, 2, 2, *range(2, 10)]
    assert sink.sizes[-4:] == [1, 2, 4, 1]
    assert outbox.sent == 9


async def test_what_a_full_queue_costs_is_no_multiple_of_what_it_takes(tmp_path: Path) -> None:
    sink = ScriptedSink(*[OK, FULL] * 40)
    outbox = outbox_on(sink, tmp_path)
    await sent_at_once(outbox, sink, [make_group(index) for index in range(30)])
    assert sum(sink.sizes) < 64 + 3 * 30
    assert outbox.sent == 30


async def test_what_was_taken_before_the_queue_was_full_is_settled(tmp_path: Path) -> None:
    sink = ScriptedSink(OK, OK, OK, FULL)
    outbox = outbox_on(sink, tmp_path)
    await sent_at_once(outbox, sink, [make_group(index) for index in range(5)])
    assert [seq for _, seq, _, _ in sink.offers] == [1, 2, 3, 4, 4, 5]


async def test_a_late_one_between_others_goes_and_those_behind_it_move_up(tmp_path: Path) -> None:
    sink = ScriptedSink(OK, OK, OK, LATE)
    outbox = outbox_on(sink, tmp_path)
    await sent_at_once(outbox, sink, [make_group(index) for index in range(6)])
    offered = [(seq, index) for _, seq, _, index in sink.offers]
    assert [seq for seq, _ in offered] == [1, 2, 3, 4, 4, 5]
    late = offered[3][1]
    assert sorted(index for _, index in offered if index != late) == [index for index in range(6) if index != late]
    assert (outbox.sent, outbox.late, outbox.unconfirmed) == (5, 1, 5)
    assert files(tmp_path) == [f"p.0/{seq}.group" for seq in range(1, 6)]


async def test_a_file_that_cannot_be_read_holds_up_none_before_it(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path, "p.0")
    for seq in range(1, 6):
        spool.write(seq, encode_group(make_group(seq)))
    spool.close()
    (spool,), sink = Spool.adopt(tmp_path), ScriptedSink()
    outbox = Outbox.adopted(sink, spool, epoch="epoch-1", outage_s=5.0)
    (tmp_path / "p.0" / "4.group").unlink()
    with pytest.raises(ConfigError, match="free it"):
        await outbox.poll()
    assert [seq for _, seq, _, _ in sink.offers] == [1, 2, 3]
