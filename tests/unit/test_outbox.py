"""The outbox: consecutive numbers, one offer at a time, the same number until it is accepted."""

import asyncio
import threading

import pytest

from actors.outbox import Outbox
from lambdapo_async.broker.interface import Descriptor, EnqueueReply, EnqueueStatus
from lambdapo_async.errors import BrokerUnavailable
from lambdapo_async.wire import decode_group
from tests.groups import make_group

OK, DUP, GAP, FULL, EPOCH, WAIT, LATE = EnqueueStatus


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
        return EnqueueReply(status, descriptor.seq, 0, "epoch-2" if status is EPOCH else epoch)


def outbox_on(sink: ScriptedSink, *, full_timeout_s: float = 60.0) -> Outbox:
    return Outbox(sink, producer="p", epoch="epoch-1", full_timeout_s=full_timeout_s)


async def test_numbers_are_consecutive_and_repeated_until_accepted() -> None:
    sink = ScriptedSink(OK, FULL, FULL, DUP, LATE)
    outbox = outbox_on(sink)
    for index in range(4):
        await outbox.send(make_group(index))
    assert [(seq, index) for _, seq, _, index in sink.offers] == [(1, 0), (2, 1), (2, 1), (2, 1), (3, 2), (3, 3)]
    assert (outbox.sent, outbox.late) == (3, 1)


@pytest.mark.parametrize(("status", "epoch"), [(GAP, "epoch-1"), (EPOCH, "epoch-2")])
async def test_a_queue_that_lost_groups_gets_a_new_producer(status: EnqueueStatus, epoch: str) -> None:
    sink = ScriptedSink(OK, status)
    outbox = outbox_on(sink)
    await outbox.send(make_group(0))
    await outbox.send(make_group(1))
    assert sink.offers[-1] == ("p.1", 1, epoch, 1)
    assert outbox.restarts == 1


async def test_a_queue_full_for_too_long_is_an_error() -> None:
    sink = ScriptedSink(*[FULL] * 10)
    with pytest.raises(BrokerUnavailable, match="full for"):
        await outbox_on(sink, full_timeout_s=0.05).send(make_group())


async def test_a_cancelled_sender_leaves_no_number_in_doubt() -> None:
    sink = ScriptedSink()
    sink.gate.clear()
    outbox = outbox_on(sink)
    first = asyncio.ensure_future(outbox.send(make_group(0)))
    while not outbox._one_offer.locked():
        await asyncio.sleep(0)
    first.cancel()
    second = asyncio.ensure_future(outbox.send(make_group(1)))
    sink.gate.set()
    await second
    assert [(seq, index) for _, seq, _, index in sink.offers] == [(1, 0), (2, 1)]


async def test_concurrent_senders_offer_one_by_one() -> None:
    sink = ScriptedSink()
    outbox = outbox_on(sink)
    await asyncio.gather(*(outbox.send(make_group(index)) for index in range(20)))
    assert [seq for _, seq, _, _ in sink.offers] == list(range(1, 21))
