"""What only a real Redis can do to us: lost replies, cut connections, damaged and missing data, strangers."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgpack
import pytest
import redis

from lambdapo_async.broker.connection import BrokerRefusedError, connect, embedded_server, redact
from lambdapo_async.broker.interface import Descriptor, EnqueueStatus
from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.errors import BrokerError, BrokerUnavailable, LostDataError, RunNotFoundError, TaskError
from lambdapo_async.rollout import Lease, Split
from lambdapo_async.weights.manifest import Manifest
from lambdapo_async.weights.redis_chunks import RedisChunks
from tests.contract.broker_world import (
    FOREVER_S,
    LIMITS,
    SHORT,
    durable,
    eventually,
    heldout,
    offer,
    start,
    train,
    until,
)
from tests.contract.test_broker_run import heartbeat
from tests.lossy_proxy import LossyProxy, lossy_proxy
from tests.redis_fixtures import TIMEOUT_S, OpenRun
from tests.weight_files import full, step


@pytest.fixture
def server(redis_url: str) -> Iterator[redis.Redis]:
    """Redis itself, behind the broker's back."""
    with contextlib.closing(connect(redis_url, timeout_s=TIMEOUT_S)) as client:
        yield client


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


def test_an_actor_refuses_another_schema(redis_run: RedisRun, server: redis.Redis) -> None:
    start(redis_run)
    server.hset(redis_run.keys.state, "schema", 7)
    with pytest.raises(RunNotFoundError, match="speaks schema 7, this version speaks 2"):
        redis_run.run_store.config_json()


def test_too_many_rows_are_refused(redis_run: RedisRun) -> None:
    store = redis_run.run_store
    small = type(store)(store._broker, redis_run.keys, store._ownership, store._seal, max_split_bytes=100)
    with pytest.raises(TaskError, match=r"task\.max_rows"):
        small.put_rows("train", [{"prompt": str(index), "answer": ""} for index in range(600)])


def test_damaged_rows_are_named(redis_run: RedisRun, server: redis.Redis) -> None:
    start(redis_run)
    redis_run.run_store.put_rows("train", [{"prompt": "p", "answer": "a"}])
    server.hset(redis_run.keys.rows("train"), "0", b"garbage")
    with pytest.raises(BrokerError, match="chunk 0 of the train rows is damaged"):
        redis_run.run_store.row("train", 0)


def test_a_missing_chunk_is_an_error_until_it_is_there(redis_run: RedisRun, server: redis.Redis) -> None:
    start(redis_run)
    rows = [{"prompt": "p", "answer": "a"}]
    redis_run.run_store.put_rows("train", rows)
    chunk = server.hget(redis_run.keys.rows("train"), "0")
    server.delete(redis_run.keys.rows("train"))
    with pytest.raises(BrokerError, match="no rows from 0 on in train"):
        redis_run.run_store.row("train", 0)
    server.hset(redis_run.keys.rows("train"), "0", chunk)
    assert redis_run.run_store.row("train", 0) == rows[0]


def test_fewer_rows_leave_no_chunk_of_the_old_ones(redis_run: RedisRun, server: redis.Redis) -> None:
    start(redis_run)
    for count in (600, 300):
        redis_run.run_store.put_rows("train", [{"prompt": "p", "answer": "a"}] * count)
    assert sorted(server.hkeys(redis_run.keys.rows("train"))) == [b"0", b"1"]


@pytest.mark.parametrize(
    "record", [b"", b"garbage", msgpack.packb({"actor_id": "x"}), msgpack.packb([1]), bytes(20_000)]
)
def test_unreadable_heartbeats_are_left_out_and_counted(
    redis_run: RedisRun, server: redis.Redis, record: bytes
) -> None:
    start(redis_run)
    redis_run.fleet.beat(heartbeat("bad"))
    redis_run.fleet.beat(heartbeat("good"))
    server.hset(redis_run.keys.fleet, "bad", record)
    assert redis_run.fleet.members() == (heartbeat("good"),)
    assert redis_run.fleet.num_unreadable == 1


def test_a_lost_payload_is_an_error(redis_run: RedisRun, server: redis.Redis) -> None:
    source = start(redis_run)
    offer(redis_run, 1, *train(0))
    server.delete(redis_run.keys.payload("a.0", 1))
    with pytest.raises(BrokerError, match="payload of group 1"):
        source.read(1, timeout_s=FOREVER_S)


def test_a_lost_entry_is_an_error(redis_run: RedisRun, server: redis.Redis) -> None:
    source = start(redis_run)
    for seq in (1, 2):
        offer(redis_run, seq, *train(seq))
    server.xtrim(redis_run.keys.queue, maxlen=1, approximate=False)
    with pytest.raises(BrokerError, match="entries of the queue are gone"):
        source.read(1, timeout_s=FOREVER_S)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_an_evicted_line_of_leases_is_an_error_and_comes_back(
    redis_run: RedisRun, server: redis.Redis, split: Split
) -> None:
    source, line = start(redis_run), {"train": redis_run.keys.todo, "heldout": redis_run.keys.heldout}[split]
    asked = (Lease(split, 0), Lease(split, 1))
    if split == "heldout":
        source.request_evaluation(asked)
    admission = redis_run.admission("a")
    assert admission.lease(2) == asked
    admission.hand_back(asked)
    assert source.read(1, timeout_s=0.01) == []
    server.delete(line)
    with pytest.raises(LostDataError, match="leases in line are gone"):
        source.read(1, timeout_s=0.01)
    with pytest.raises(LostDataError, match="leases in line are gone"):
        source.commit({})
    source.initialise(durable())
    source.request_evaluation(asked)
    assert source.read(1, timeout_s=0.01) == []
    assert admission.lease(2) == asked


def test_whichever_way_leases_come_into_line_and_leave_it_nothing_looks_lost(
    redis_run: RedisRun, server: redis.Redis
) -> None:
    source, first = start(redis_run), redis_run.admission("a")

    def in_line() -> int:
        source.read(1, timeout_s=0.01)
        return int(server.hget(redis_run.keys.state, "in_line") or 0)

    assert first.lease(4) == train(0, 1, 2, 3)
    first.hand_back(train(1, 2))
    assert in_line() == 2
    assert offer(redis_run, 1, *train(2), producer="c.0").status is EnqueueStatus.OK  # answered while it was in line
    assert in_line() == 1
    redis_run.fleet_control(1).quarantine(["a"])
    source.request_evaluation(heldout(0))
    assert in_line() == 4
    assert redis_run.admission("b").lease(9) == (*heldout(0), *train(0, 3, 1))
    assert in_line() == 0


def test_expired_leases_do_not_look_lost(redis_run: RedisRun) -> None:
    source = start(redis_run, SHORT)
    redis_run.admission("a").lease(4)
    assert eventually(lambda: redis_run.admission("b").lease(1)) == train(0)
    assert (source.stats().returned, source.read(1, timeout_s=0.01)) == (3, [])


def test_the_quarantine_is_bounded(redis_run: RedisRun, server: redis.Redis) -> None:
    source = start(redis_run)
    offer(redis_run, 1, *train(0))
    (delivery,) = source.read(1, timeout_s=FOREVER_S)
    for seq in range(300):
        source.quarantine(replace(delivery.descriptor, seq=seq), b"x", "reason")
    assert (source.stats().quarantined, server.xlen(redis_run.keys.dead)) == (300, 256)


def test_of_a_quarantined_payload_the_beginning_is_kept(redis_run: RedisRun, server: redis.Redis) -> None:
    source = start(redis_run)
    descriptor = Descriptor("a.0", 1, *train(0), 0, 1, 0.0)
    source.quarantine(descriptor, bytes(3 * 1024**2), "reason")
    source.quarantine(descriptor, bytes(3 * 1024**2), "reason")
    ((_, entry),) = server.xrange(redis_run.keys.dead)
    assert (len(entry[b"payload"]), entry[b"n"]) == (1024**2, b"%d" % (3 * 1024**2))


def test_nothing_is_left_of_committed_groups(redis_run: RedisRun, server: redis.Redis) -> None:
    source = start(redis_run)
    for seq in range(1, 8):
        offer(redis_run, seq, *train(seq))
        source.read(1, timeout_s=FOREVER_S)
    source.commit({"a.0": 7})
    assert server.keys(redis_run.keys.payload("a.0", 1)[:-1] + b"*") == []
    assert (source.stats().queued, source.stats().num_bytes) == (0, 0)


def test_every_key_lies_in_the_runs_slot(open_redis_run: OpenRun[RedisRun], server: redis.Redis) -> None:
    run = open_redis_run()
    before = set(server.keys())
    source = start(run)
    run.run_store.put_rows("train", [{"prompt": "p", "answer": "a"}])
    source.request_evaluation(train(5))
    (lease,) = run.admission("a").lease(1)
    offer(run, 1, lease)
    source.commit({"a.0": 1})
    run.weights.publish(1, [full(1)], consumed=0, fence=1)
    run.fleet.beat(heartbeat("a"))
    tag = b"{lp:%s}:" % run.keys.run_id.encode()
    assert {name[: len(tag)] for name in set(server.keys()) - before} == {tag}


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:secret@h:1/0", "redis://:***@h:1/0"),
        ("rediss://me:secret@h/2", "rediss://me:***@h/2"),
        ("unix:///s?db=1&password=secret", "unix:///s?db=1&password=***"),
        ("redis://h:6379", "redis://h:6379"),
    ],
)
def test_passwords_are_not_shown(url: str, shown: str) -> None:
    assert redact(url) == shown


def test_an_unreachable_redis_is_named_after_the_deadline(tmp_path: Path) -> None:
    run = RedisRun(f"unix://:secret@{tmp_path}/nobody", "r", timeout_s=0.2)
    with pytest.raises(BrokerUnavailable, match=r"unix://:\*\*\*@.*nobody did not answer for 0\.\d s"):
        run.run_store.state()


@pytest.mark.parametrize("password", ["", ":wrong@"])
def test_a_wrong_password_is_refused_at_once(server: redis.Redis, redis_url: str, password: str) -> None:
    url = redis_url.replace("unix://", f"unix://{password}")
    server.config_set("requirepass", "right")
    try:
        with (
            contextlib.closing(RedisRun(url, "r", timeout_s=TIMEOUT_S)) as run,
            pytest.raises(BrokerRefusedError, match="check user and password") as refused,
        ):
            run.run_store.state()
        assert "wrong@" not in str(refused.value)
    finally:
        server.config_set("requirepass", "")


def test_something_else_than_redis_is_refused(tmp_path: Path) -> None:
    with _answering(lambda: b"HTTP/1.1 400 Bad Request\r\n\r\n") as url:
        run = RedisRun(url, "r", timeout_s=0.5)
        with pytest.raises(BrokerError, match=url):
            run.run_store.state()


@pytest.mark.parametrize(
    "url", ["http://h:1", "h:6379", "redis://h:port", "redis://h?foo=1", "redis://h?db=x", "rediss://h?ssl_cert_reqs=x"]
)
def test_what_is_no_redis_url_is_refused(url: str) -> None:
    with pytest.raises(BrokerRefusedError, match="no Redis URL"):
        RedisRun(url, "r", timeout_s=1.0)


def test_our_server_dies_with_its_parent(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from lambdapo_async.broker.connection import embedded_server\n"
        "with embedded_server(pathlib.Path(sys.argv[1])) as url:\n"
        "    print(url, flush=True); sys.stdin.read()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout is not None
        url = parent.stdout.readline().strip()
        with contextlib.closing(connect(url, timeout_s=FOREVER_S)) as client:
            assert client.ping()
            parent.kill()
            until(lambda: not _answers(client))


def test_our_server_keeps_its_data(tmp_path: Path) -> None:
    for expected in (None, b"value"):
        with (
            embedded_server(tmp_path) as url,
            contextlib.closing(connect(url, timeout_s=FOREVER_S)) as client,
        ):
            assert client.get("name") == expected
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            client.set("name", b"value")


def test_our_server_starts_again_while_a_child_of_the_killed_one_lives(tmp_path: Path) -> None:
    with embedded_server(tmp_path) as url, contextlib.closing(connect(url, timeout_s=FOREVER_S)) as client:
        client.set("name", b"value")
        client.config_set("rdb-key-save-delay", 5_000_000)  # microseconds: the child saves, and holds our socket
        client.bgsave()
        os.kill(client.info("server")["process_id"], signal.SIGKILL)
        with (
            embedded_server(tmp_path) as url_again,
            contextlib.closing(connect(url_again, timeout_s=FOREVER_S)) as again,
        ):
            assert again.get("name") == b"value"


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except (redis.ConnectionError, redis.TimeoutError):
        return False


@contextlib.contextmanager
def _answering(reply: Callable[[], bytes]) -> Iterator[str]:
    """A server that says the same to everything."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/s")
        listener.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(1 << 16)
                        connection.sendall(reply())

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"unix://{folder}/s"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(FOREVER_S)


@pytest.mark.parametrize("lost", ["manifest", "piece"])
def test_a_version_that_was_lost_while_it_was_written_does_not_become_the_head(
    redis_run: RedisRun, server: redis.Redis, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """Its learner may have made a restarted server its own between the first script and the last one."""
    start(redis_run)
    keys, store = redis_run.keys, redis_run.weights
    store.publish(0, [full(0)], consumed=0, fence=1)
    put = RedisChunks.put

    def put_and_lose(chunks: RedisChunks, manifest: Manifest, payload: bytes, *, fence: int) -> None:
        put(chunks, manifest, payload, fence=fence)
        if lost == "piece":
            server.delete(keys.weights_chunk(manifest.name, 0))
        else:
            server.hdel(keys.weights_begun, manifest.name)

    monkeypatch.setattr(RedisChunks, "put", put_and_lose)
    with pytest.raises(LostDataError, match="is gone"):
        store.publish(1, [step(1)], consumed=0, fence=1)
    assert store.head() == 0
    assert [file.version for file in store.files()] == [0]
