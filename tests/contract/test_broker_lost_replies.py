"""Lost replies and cut connections: whatever is asked again happens once."""

import contextlib
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from lambdapo_async.broker.interface import Descriptor, EnqueueStatus
from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.errors import LostDataError
from tests.contract.broker_world import FOREVER_S, LIMITS, durable, offer, start, train, until
from tests.lossy_proxy import LossyProxy, lossy_proxy
from tests.redis_fixtures import TIMEOUT_S


@pytest.fixture
def proxy(redis_url: str) -> Iterator[LossyProxy]:
    with tempfile.TemporaryDirectory() as folder, lossy_proxy(Path(folder), redis_url) as lossy:
        yield lossy


@pytest.fixture
def shaky_run(proxy: LossyProxy, redis_run: RedisRun) -> Iterator[RedisRun]:
    """``redis_run`` over connections that lose replies."""
    with contextlib.closing(RedisRun(proxy.url, redis_run.keys.run_id, timeout_s=TIMEOUT_S)) as run:
        run.fleet.members()  # connected: what is lost from here on is a reply to a call
        yield run


@pytest.mark.parametrize("lost", [1, 3])
def test_an_offer_whose_reply_is_lost_makes_one_entry(
    redis_run: RedisRun, shaky_run: RedisRun, proxy: LossyProxy, lost: int
) -> None:
    source = start(redis_run)
    epoch = redis_run.run_store.state().epoch
    redis_run.admission("a").lease(2)
    proxy.lose_replies(lost)
    assert offer(shaky_run, 1, *train(0), epoch=epoch).status in (EnqueueStatus.OK, EnqueueStatus.DUP)
    assert proxy.lost == lost
    assert offer(shaky_run, 2, *train(1), epoch=epoch).status is EnqueueStatus.OK
    assert [one.descriptor.seq for one in source.read(9, timeout_s=FOREVER_S)] == [1, 2]
    assert (source.stats().queued, source.stats().admitted) == (2, 2)


def test_bytes_that_were_left_at_a_number_are_not_taken_for_its_group(redis_run: RedisRun, server: redis.Redis) -> None:
    """Of a group that was late, from a connection that was cut before the script; as long as the one that comes now."""
    source = start(redis_run)
    server.set(redis_run.keys.payload("a.0", 1), b"another")
    assert offer(redis_run, 1, *train(0), payload=b"payload").status is EnqueueStatus.OK
    (delivery,) = source.read(1, timeout_s=FOREVER_S)
    assert delivery.payload == b"payload"


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_late_group_that_comes_again_does_not_become_the_payload_of_the_next(
    redis_run: RedisRun, server: redis.Redis, is_lost: bool
) -> None:
    source, payload_key = start(redis_run), redis_run.keys.payload("a.0", 1)
    redis_run.admission("b").lease(1)
    assert offer(redis_run, 1, *train(0), payload=b"late").status is EnqueueStatus.LATE
    assert offer(redis_run, 1, *train(1), payload=b"next").status is EnqueueStatus.OK
    if is_lost:
        server.delete(payload_key)
    assert offer(redis_run, 1, *train(0), payload=b"late").status is EnqueueStatus.DUP
    if is_lost:
        with pytest.raises(LostDataError, match="payload of group 1"):
            source.read(1, timeout_s=FOREVER_S)
    else:
        assert [one.payload for one in source.read(1, timeout_s=FOREVER_S)] == [b"next"]
    assert server.keys(payload_key.replace(b"{", b"[{]") + b"*") == ([] if is_lost else [payload_key])
    assert server.ttl(payload_key) == (-2 if is_lost else -1)


def test_a_grant_whose_reply_is_lost_is_granted_once(
    redis_run: RedisRun, shaky_run: RedisRun, proxy: LossyProxy
) -> None:
    source = start(redis_run)
    admission = shaky_run.admission("a")
    assert admission.lease(1) == train(0)
    proxy.lose_replies(1)
    assert admission.lease(2) == train(1, 2)
    assert proxy.lost == 1
    assert admission.lease(9) == train(3)
    assert source.stats().leased == 4


@pytest.mark.parametrize("call", range(8))
def test_a_learner_whose_replies_are_lost_does_everything_once(
    redis_run: RedisRun, shaky_run: RedisRun, proxy: LossyProxy, call: int
) -> None:
    """Loses the reply to one call after the other of a learner's life."""
    epoch_seen: list[str] = []
    source = shaky_run.source(1, LIMITS)
    (seq_1, seq_2) = train(0, 1)
    life: list[Callable[[], object]] = [
        lambda: shaky_run.run_store.create(b"{}", {"f": b"1"}, fence=1),
        lambda: source.initialise(durable()),
        lambda: shaky_run.run_store.set_phase("running", fence=1),
        lambda: epoch_seen.append(shaky_run.run_store.state().epoch),
        lambda: [offer(redis_run, 1, seq_1), offer(redis_run, 2, seq_2), source.read(9, timeout_s=FOREVER_S)],
        lambda: source.release(1),
        lambda: source.quarantine(Descriptor("a.0", 1, seq_1, 0, 1, 0.0), b"x", "reason"),
        lambda: source.commit({"a.0": 1}),
    ]
    for number, act in enumerate(life):
        proxy.lose_replies(1 if number == call else 0)
        act()
    assert proxy.lost == 1
    stats = source.stats()
    assert (stats.queued, stats.num_bytes, stats.admitted, stats.quarantined) == (1, len(b"payload"), 1, 1)
    assert epoch_seen == [redis_run.run_store.state().epoch]


def test_cut_connections_are_opened_again(redis_run: RedisRun, server: redis.Redis) -> None:
    source = start(redis_run)
    read: list[int] = []
    reader = threading.Thread(
        target=lambda: read.extend(one.descriptor.seq for one in source.read(1, timeout_s=FOREVER_S))
    )
    reader.start()
    until(lambda: any(client["cmd"] == "xread" for client in server.client_list()))
    server.client_kill_filter(_type="normal", skipme=True)
    assert offer(redis_run, 1, *train(0)).status is EnqueueStatus.OK
    reader.join(FOREVER_S)
    assert read == [1]
