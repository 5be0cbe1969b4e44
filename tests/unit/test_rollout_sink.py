"""The actor's end of the queue on a server that does not keep what it is given."""

from collections.abc import Callable

import pytest
import redis

from lambdapo_async.broker.client import Broker
from lambdapo_async.broker.interface import Delivery, Descriptor, EnqueueReply, EnqueueStatus
from lambdapo_async.broker.rollout_sink import RedisRolloutSink
from lambdapo_async.keys import RunKeys
from lambdapo_async.rollout import Lease
from lambdapo_async.seal import Seal


class EvictingServer(Broker):
    """Whatever is put down is gone when the script looks for it."""

    def __init__(self, *, evictions: int) -> None:
        self.evictions, self.uploads = evictions, 0

    def call(self, operation: Callable[[redis.Redis], object]) -> list[object]:
        self.uploads += 1
        assert self.uploads < 100, "the same payload is sent over and over"
        is_kept = self.uploads > self.evictions
        return [b"OK", [b"OK", 3, 1, b"epoch"] if is_kept else [b"AGAIN", 2, 1, b"epoch"]]


def offer(server: EvictingServer, *, num_groups: int = 1) -> EnqueueReply:
    sink = RedisRolloutSink(server, RunKeys("run"), Seal(None, run_id="run"))
    deliveries = [
        Delivery(Descriptor("a.0", 3 + index, Lease("train", index), 0, 7, 0.5), b"payload")
        for index in range(num_groups)
    ]
    return sink.enqueue(deliveries, epoch="epoch")


def test_a_server_that_evicts_every_payload_has_no_room(caplog: pytest.LogCaptureFixture) -> None:
    server = EvictingServer(evictions=10_000)
    assert offer(server) == EnqueueReply(EnqueueStatus.FULL, 2, 1, "epoch")
    assert server.uploads == 2
    assert "drops the payload of group" in caplog.text
    assert "noeviction" in caplog.text


def test_of_a_burst_what_was_taken_stays_taken(caplog: pytest.LogCaptureFixture) -> None:
    class Cramped(EvictingServer):
        """Takes one, and has no room for the next."""

        def call(self, operation: Callable[[redis.Redis], object]) -> list[object]:
            self.uploads += 1
            return [b"OK", [b"AGAIN", 3, 1, b"epoch"]]

    server = Cramped(evictions=10_000)
    assert offer(server, num_groups=3) == EnqueueReply(EnqueueStatus.FULL, 3, 1, "epoch")
    assert (server.uploads, caplog.text) == (1, "")


def test_a_payload_that_was_in_the_way_costs_one_upload_more(caplog: pytest.LogCaptureFixture) -> None:
    server = EvictingServer(evictions=1)
    assert offer(server) == EnqueueReply(EnqueueStatus.OK, 3, 1, "epoch")
    assert (server.uploads, caplog.text) == (2, "")
