"""An outbox keeps its groups on the disk; in memory it holds those that the queue does not have yet."""

import tracemalloc
from collections.abc import Sequence
from pathlib import Path

from actors.outbox import AT_ONCE_BYTES, Outbox
from actors.spool import Spool
from lambdapo_async.broker.interface import Delivery, EnqueueReply, EnqueueStatus, Marks
from lambdapo_async.wire import decode_group, encode_group
from tests.groups import make_group

NUM_GROUPS, NUM_TOKENS = 40, 20_000
"""Of 160 kB a rollout, two of them a group."""


class ForgetfulSink:
    """Takes everything, and may lose it."""

    def __init__(self) -> None:
        self.last, self.indices = 0, list[int]()

    def enqueue(self, deliveries: Sequence[Delivery], *, epoch: str) -> EnqueueReply:
        for each in deliveries:
            group = decode_group(each.payload, vocab_size=1000, max_version=100)
            assert (group.lease, len(each.payload)) == (each.descriptor.lease, each.descriptor.num_bytes)
            self.indices.append(group.lease.index)
            self.last = each.descriptor.seq
        return EnqueueReply(EnqueueStatus.OK, self.last, 0, epoch)

    def marks(self, producer: str) -> Marks:
        return Marks(is_open=True, last=self.last, committed=0, epoch="epoch")


async def test_what_the_queue_took_lies_on_the_disk_alone_until_it_is_asked_for_again(tmp_path: Path) -> None:
    sink = ForgetfulSink()
    outbox = Outbox(sink, Spool.create(tmp_path, "a.0"), epoch="epoch", outage_s=5.0)
    tracemalloc.start()
    try:
        for index in range(NUM_GROUPS):
            await outbox.send(make_group(index, num_tokens=NUM_TOKENS))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (outbox.unconfirmed, sink.indices) == (NUM_GROUPS, list(range(NUM_GROUPS)))
    assert held < one_payload() * 3
    sink.last = 0
    await outbox.poll()
    assert sink.indices == 2 * list(range(NUM_GROUPS))


async def test_what_a_dead_actor_left_is_read_when_it_is_offered(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path, "a.0")
    for seq in range(1, NUM_GROUPS + 1):
        spool.write(seq, encode_group(make_group(seq, num_tokens=NUM_TOKENS)))
    spool.close()
    (spool,), sink = Spool.adopt(tmp_path), ForgetfulSink()
    tracemalloc.start()
    try:
        orphan = Outbox.adopted(sink, spool, epoch="epoch", outage_s=5.0)
        await orphan.poll()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (orphan.unconfirmed, sink.indices) == (NUM_GROUPS, list(range(1, NUM_GROUPS + 1)))
    assert held < AT_ONCE_BYTES + one_payload()  # a thread may not have let go of what it sent


def one_payload() -> int:
    return len(encode_group(make_group(num_tokens=NUM_TOKENS)))
