"""Several groups in one offer, in memory and in Redis."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest

from lambdapo_async.broker.connection import connect
from lambdapo_async.broker.interface import Delivery, Descriptor, EnqueueReply
from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.errors import BrokerError
from tests.contract.broker_world import DUP, EPOCH, FOREVER_S, FULL, GAP, LATE, LIMITS, OK, offer, start, train
from tests.redis_fixtures import BrokerRun
from tests.redis_server import RDB, own_server


def burst(
    run: BrokerRun, first: int, indices: Sequence[int], *, epoch: str | None = None, sizes: Sequence[int] | None = None
) -> EnqueueReply:
    """The groups of these indices, numbered from ``first``; each payload names its index."""
    deliveries = [
        Delivery(Descriptor("a.0", seq, *train(index), 0, size, 0.5), bytes([index]) * size)
        for seq, (index, size) in enumerate(zip(indices, sizes or [7] * len(indices), strict=True), first)
    ]
    return run.sink().enqueue(deliveries, epoch=run.run_store.state().epoch if epoch is None else epoch)


def answer(reply: EnqueueReply) -> tuple[object, int]:
    return reply.status, reply.last


def test_they_arrive_in_order_each_with_its_own_bytes(broker_run: BrokerRun) -> None:
    source = start(broker_run)
    assert broker_run.admission("a").lease(3) == train(0, 1, 2)
    assert answer(burst(broker_run, 1, [2, 0, 1], sizes=[3, 1, 2])) == (OK, 3)
    arrived = source.read(5, timeout_s=FOREVER_S)
    assert [one.descriptor.seq for one in arrived] == [1, 2, 3]
    assert [one.payload for one in arrived] == [b"\2\2\2", b"\0", b"\1\1"]
    assert (source.stats().queued, source.stats().num_bytes, source.stats().leased) == (3, 6, 0)


def test_those_that_are_in_already_hold_up_no_other(broker_run: BrokerRun) -> None:
    source = start(broker_run)
    burst(broker_run, 1, [0, 1])
    assert answer(burst(broker_run, 1, [0, 1, 2, 3])) == (OK, 4)
    assert answer(burst(broker_run, 2, [1, 2])) == (DUP, 4)
    assert [one.descriptor.lease for one in source.read(9, timeout_s=FOREVER_S)] == [*train(0, 1, 2, 3)]


def test_behind_a_late_one_nothing_is_taken(broker_run: BrokerRun) -> None:
    source = start(broker_run)
    broker_run.admission("b").lease(2)
    offer(broker_run, 1, *train(1), producer="b.0")
    assert answer(burst(broker_run, 1, [5, 1, 6])) == (LATE, 1)
    assert source.stats().late == 1
    assert answer(burst(broker_run, 2, [6])) == (OK, 2)


@pytest.mark.parametrize("room", [{"max_groups": 2}, {"max_bytes": 20}])
def test_as_many_as_there_is_room_for(broker_run: BrokerRun, room: dict[str, int]) -> None:
    source = start(broker_run, dataclasses.replace(LIMITS, group_bytes=7, **room))
    assert answer(burst(broker_run, 1, [0, 1, 2, 3])) == (FULL, 2)
    assert (source.stats().queued, source.stats().num_bytes, source.stats().full) == (2, 14, 1)
    source.read(5, timeout_s=FOREVER_S)
    source.commit({"a.0": 2})
    assert answer(burst(broker_run, 3, [2, 3])) == (OK, 4)


def test_a_gap_or_another_epoch_refuses_all(broker_run: BrokerRun) -> None:
    source = start(broker_run)
    assert answer(burst(broker_run, 2, [0, 1])) == (GAP, 0)
    assert answer(burst(broker_run, 1, [0, 1], epoch="other")) == (EPOCH, 0)
    assert source.stats().queued == 0


def test_the_one_that_can_never_fit_is_named_once_it_is_the_first(broker_run: BrokerRun) -> None:
    source = start(broker_run)
    assert answer(burst(broker_run, 1, [0, 1, 2], sizes=[7, 1001, 8])) == (FULL, 1)
    with pytest.raises(BrokerError, match="group train:0:1 has 1001 bytes"):
        burst(broker_run, 2, [1, 2], sizes=[1001, 8])
    assert source.stats().queued == 1


@pytest.mark.parametrize("knows_the_script", [True, False])
def test_a_server_without_memory_takes_what_it_has_room_for(tmp_path: Path, knows_the_script: bool) -> None:
    size = 500_000
    with own_server(tmp_path, RDB) as own, contextlib.closing(RedisRun(own.url, "test", timeout_s=3.0)) as run:
        source = start(run, dataclasses.replace(LIMITS, max_bytes=100 * size, group_bytes=size))
        if knows_the_script:
            offer(run, 1, *train(9), producer="b.0")
            source.read(1, timeout_s=FOREVER_S)
            source.commit({"b.0": 1})
        own.client.config_set("maxmemory", own.client.info("memory")["used_memory"] + int(3.5 * size))
        taken = burst(run, 1, list(range(8)), sizes=[size] * 8)
        assert taken.status is FULL
        assert 0 < taken.last < 8
        arrived = source.read(9, timeout_s=FOREVER_S)
        assert [one.descriptor.seq for one in arrived] == list(range(1, taken.last + 1))
        source.commit({"a.0": taken.last})
        assert burst(run, taken.last + 1, [8], sizes=[size]).status is OK


def test_nothing_is_left_of_those_that_were_refused(redis_run: RedisRun, redis_url: str) -> None:
    start(redis_run, dataclasses.replace(LIMITS, max_groups=3))
    burst(redis_run, 1, [0, 1])
    burst(redis_run, 1, [0, 1, 2, 3, 4])
    client = connect(redis_url, timeout_s=10.0)
    payloads = {redis_run.keys.payload("a.0", seq) for seq in (1, 2, 3)}
    assert set(client.scan_iter(redis_run.keys.all_payloads)) == payloads
    assert {client.ttl(name) for name in payloads} == {-1}
    client.close()
