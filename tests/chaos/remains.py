"""What a run under faults leaves: the final checkpoint, and what its Redis holds."""

from collections.abc import Sequence
from pathlib import Path

import redis

from lambdapo_async.keys import RunKeys
from lambdapo_async.rollout import Lease
from learner.checkpoint import CheckpointStore
from tests.chaos.counting_policy import read_history
from tests.chaos.ledger import Remains
from tests.chaos.redis_control import RedisControl
from tests.chaos.spec import RUN_ID, output_dir


def read_remains(folder: Path, server: RedisControl, problems: Sequence[str]) -> Remains:
    """After the end; the server still runs, nobody else does."""
    checkpoint = CheckpointStore(output_dir(folder) / RUN_ID / "checkpoints").load_latest()
    assert checkpoint is not None
    client, keys = server.client(), RunKeys(RUN_ID)
    try:
        frontier, counted = (int(value or 0) for value in client.hmget(keys.state, ["frontier", "bytes"]))
        queued, queued_bytes, orphans = _queue(client, keys)
        leased = _indices(client.zrange(keys.leases, 0, -1))
        todo = _indices(client.lrange(keys.todo, 0, -1))
    finally:
        client.close()
    return Remains(
        history=read_history(checkpoint.model_dir),
        consumed=checkpoint.state.consumed,
        frontier=frontier,
        held={"queue": queued, "leased": leased, "todo": todo},
        counted_bytes=counted,
        queued_bytes=queued_bytes,
        orphans=orphans,
        problems=problems,
    )


def _queue(client: redis.Redis, keys: RunKeys) -> tuple[frozenset[int], int, int]:
    """Training indices, payload bytes, and halves without their other half."""
    entries = client.xrange(keys.queue)
    named = {keys.payload(fields[b"p"].decode(), int(fields[b"s"])) for _, fields in entries}
    prefix = keys.payload("", 0).removesuffix(b":0")
    found = set(client.scan_iter(match=prefix.replace(b"{", b"[{]") + b"*", count=1000))
    queued_bytes = sum(client.strlen(name) for name in named)
    indices = _indices([fields[b"l"] for _, fields in entries])
    return indices, queued_bytes, len(named ^ found)


def _indices(lease_ids: Sequence[bytes]) -> frozenset[int]:
    leases = [Lease.from_id(each.decode()) for each in lease_ids]
    return frozenset(lease.index for lease in leases if lease.split == "train")
