"""A slow link: what moves is not given up, what does not is named."""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from lambdapo_async.broker.client import Broker
from lambdapo_async.broker.interface import EnqueueStatus
from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.errors import BrokerUnavailable
from tests.contract.broker_world import FOREVER_S, LIMITS, offer, start, train
from tests.lossy_proxy import LossyProxy, lossy_proxy

PAYLOAD = bytes(3 * 2**20)
ROOMY = replace(LIMITS, max_bytes=2**24, group_bytes=2**22)


@pytest.fixture
def proxy(redis_url: str) -> Iterator[LossyProxy]:
    with tempfile.TemporaryDirectory() as folder, lossy_proxy(Path(folder), redis_url) as slow:
        yield slow


def test_a_group_slower_than_one_replys_deadline_goes_through_at_once(
    redis_run: RedisRun, proxy: LossyProxy, server: redis.Redis
) -> None:
    """Each way takes 1.5 s, where no reply may take more than 1 s."""
    with contextlib.closing(RedisRun(proxy.url, redis_run.keys.run_id, timeout_s=3.0)) as run:
        source = start(run, ROOMY)
        epoch = run.run_store.state().epoch
        offer(run, 1, *train(0), epoch=epoch)  # or a server that does not know the script yet would have it twice
        source.read(1, timeout_s=FOREVER_S)
        before = server.info("stats")["total_net_input_bytes"]
        proxy.throttle.slow_down(len(PAYLOAD) / 1.5, delay_s=0.01)
        assert offer(run, 2, *train(1), payload=PAYLOAD, epoch=epoch).status is EnqueueStatus.OK
        assert server.info("stats")["total_net_input_bytes"] - before < 2 * len(PAYLOAD), "it was sent again"
        (delivery,) = source.read(1, timeout_s=FOREVER_S)
        assert delivery.payload == PAYLOAD


def test_a_link_too_slow_for_the_deadline_is_named(redis_run: RedisRun, proxy: LossyProxy) -> None:
    with contextlib.closing(RedisRun(proxy.url, redis_run.keys.run_id, timeout_s=0.6)) as run:
        start(redis_run, ROOMY)
        epoch = redis_run.run_store.state().epoch
        proxy.throttle.slow_down(50_000)
        with pytest.raises(BrokerUnavailable, match=r"in time \(if the link is slow raise broker.timeout_s\)"):
            offer(run, 1, *train(0), payload=PAYLOAD, epoch=epoch)
        proxy.throttle.full_speed()
        assert offer(redis_run, 1, *train(0), payload=PAYLOAD).status is EnqueueStatus.OK


def test_who_is_not_there_is_not_called_slow(tmp_path: Path) -> None:
    broker = Broker(f"unix://{tmp_path}/nobody", timeout_s=0.1)
    with pytest.raises(BrokerUnavailable, match="did not answer for"):
        broker.call(lambda client: client.ping())
