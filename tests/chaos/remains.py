"""What a run under faults leaves: the final checkpoint, and what its Redis holds."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import redis

from lambdapo_async.broker.interface import Descriptor
from lambdapo_async.journal.history import History
from lambdapo_async.journal.records import GroupRecord
from lambdapo_async.keys import RunKeys
from lambdapo_async.rollout import Lease
from lambdapo_async.wire import decode_group
from learner.checkpoint import Checkpoint, CheckpointStore
from learner.pool import PoolState
from tests.chaos.counting_policy import read_history
from tests.chaos.proof import Remains
from tests.chaos.redis_control import RedisControl
from tests.chaos.spec import RUN_ID, output_dir, spool_dir


def read_remains(folder: Path, server: RedisControl, problems: Sequence[str], *, max_uses: int = 1) -> Remains:
    """After the end of a scene's run; the server still runs, nobody else does."""
    run = output_dir(folder) / RUN_ID
    checkpoint = _newest(run)
    pool = checkpoint.state.pool
    consumed = pool.replay.consumed + pool.num_discarded if max_uses == 1 else None
    found = look_around(run, spool_dir(folder), server)
    with contextlib.closing(server.client()) as client:
        executed = client.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"]  # of this server's life
    history = read_history(checkpoint.model_dir)
    return replace(found, history=history, consumed=consumed, executed=executed, problems=problems)


def look_around(run: Path, spool: Path, server: RedisControl) -> Remains:
    """Where groups are that were not trained on; history and counts are somebody else's to fill in.

    Args:
        run: the run's folder, named as the run.
        spool: in which its actors kept their groups.
        server: it runs, with nobody else.
    """
    client, keys = server.client(), RunKeys(run.name)
    try:
        frontier, counted = (int(value or 0) for value in client.hmget(keys.state, ["frontier", "bytes"]))
        queued, queued_bytes, orphans = _queue(client, keys)
        leased = _indices(client.zrange(keys.leases, 0, -1))
        todo = _indices(client.lrange(keys.todo, 0, -1))
    finally:
        client.close()
    kept = _kept(run / "journal", _newest(run).state.pool)
    return Remains(
        history=(),
        consumed=None,
        frontier=frontier,
        held={
            "queue": queued,
            "leased": leased,
            "todo": todo,
            "outbox": _spooled(spool),
            "learner": frozenset(descriptor.lease.index for descriptor in kept),
        },
        kept=frozenset((descriptor.producer, descriptor.seq) for descriptor in kept),
        counted_bytes=counted,
        queued_bytes=queued_bytes,
        orphans=orphans,
    )


def _newest(run: Path) -> Checkpoint:
    checkpoint = CheckpointStore(run / "checkpoints").load_latest(History.find(run / "journal"))
    assert checkpoint is not None
    return checkpoint


def _kept(journal: Path, pool: PoolState) -> list[Descriptor]:
    """Training groups that the learner holds durably: in the replay queue, or on their way to it."""
    return [
        record.descriptor
        for number, record in History.find(journal).read(pool.keep_from)
        if isinstance(record, GroupRecord) and record.descriptor.lease.split == "train"
        if number > pool.taken or number in pool.replay.uses
    ]


def _spooled(root: Path) -> frozenset[int]:
    """Groups that actors still keep, dead or alive."""
    groups = (
        decode_group(path.read_bytes(), vocab_size=2**31 - 1, max_version=2**31) for path in root.rglob("*.group")
    )
    return frozenset(group.lease.index for group in groups if group.lease.split == "train")


def _queue(client: redis.Redis, keys: RunKeys) -> tuple[frozenset[int], int, int]:
    """Training indices, payload bytes, and halves without their other half."""
    entries = client.xrange(keys.queue)
    named = {keys.payload(fields[b"p"].decode(), int(fields[b"s"])) for _, fields in entries}
    prefix = keys.payload("", 0).removesuffix(b":0")
    found = set(client.scan_iter(match=prefix.replace(b"{", b"[{]") + b"*", count=1000))
    found -= {name for name in found - named if client.ttl(name) >= 0}  # put down, never offered, soon gone
    queued_bytes = sum(client.strlen(name) for name in named)
    indices = _indices([fields[b"l"] for _, fields in entries])
    return indices, queued_bytes, len(named ^ found)


def _indices(lease_ids: Sequence[bytes]) -> frozenset[int]:
    leases = [Lease.from_id(each.decode()) for each in lease_ids]
    return frozenset(lease.index for lease in leases if lease.split == "train")
