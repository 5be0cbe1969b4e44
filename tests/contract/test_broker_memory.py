"""What lies in Redis beside the queue is bounded by what its administrator was told to set aside."""

from dataclasses import replace

import redis

from lambdapo_async.broker.interface import Descriptor
from lambdapo_async.broker.redis_run import RedisRun
from tests.contract.broker_world import start, train


def test_malformed_groups_leave_the_queue_its_memory(redis_run: RedisRun, server: redis.Redis) -> None:
    """The 200 MiB beside the queue are for rows and model files, too: 256 groups of a MB took more than all."""
    source, largest = start(redis_run), bytes(2 * 1024**2)
    for seq in range(300):
        source.quarantine(Descriptor("a.0", seq, *train(seq), 0, len(largest), 0.0), largest, "reason" * 100_000)
    assert source.stats().quarantined == 300
    assert server.memory_usage(redis_run.keys.dead, samples=0) < 6 * 1024**2


def test_what_a_person_needs_of_a_malformed_group_is_kept(redis_run: RedisRun, server: redis.Redis) -> None:
    source, payload = start(redis_run), bytes(range(256)) * 1024
    descriptor = Descriptor("a.0", 1, *train(0), 0, len(payload), 0.0)
    for producer in ("a.0", "ü" * 3000):
        source.quarantine(replace(descriptor, producer=producer), payload, "reason 1\ud800" * 1000)
    (_, entry), (_, foreign) = server.xrange(redis_run.keys.dead)
    assert (entry[b"p"], entry[b"s"], entry[b"n"]) == (b"a.0", b"1", b"%d" % len(payload))
    assert entry[b"reason"].startswith(b"reason 1")
    assert entry[b"payload"] == payload[: 16 * 1024]
    assert foreign[b"p"].decode() == "ü" * 512
