"""The server under test really loses what it is said to lose."""

import contextlib
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from lambdapo_async.broker.connection import connect
from tests.chaos.folders import scene_folder
from tests.chaos.proxy import Proxy
from tests.chaos.redis_control import RedisControl, held_bytes


@pytest.fixture
def folder() -> Iterator[Path]:
    with scene_folder("redis") as path:
        yield path


@contextlib.contextmanager
def server(folder: Path, persistence: str) -> Iterator[RedisControl]:
    control = RedisControl(folder / "r", persistence)
    control.start()
    try:
        yield control
    finally:
        control.close()


def restart(control: RedisControl) -> None:
    control.kill()
    control.start()


def keys(control: RedisControl) -> set[bytes]:
    with contextlib.closing(control.client()) as client:
        return set(client.keys())


def put(control: RedisControl, *names: str) -> None:
    with contextlib.closing(control.client()) as client:
        for name in names:
            client.set(name, "x")


@pytest.mark.parametrize(("persistence", "kept"), [("none", False), ("everysec", True), ("always", True)])
def test_a_killed_server_keeps_what_its_log_holds(folder: Path, persistence: str, kept: bool) -> None:
    with server(folder, persistence) as control:
        put(control, "a")
        restart(control)
        assert keys(control) == ({b"a"} if kept else set())


def test_a_cut_log_loses_its_newest_writes_alone(folder: Path) -> None:
    with server(folder, "everysec") as control:
        put(control, *map(str, range(50)))
        control.kill()
        cut = control.cut_log(random.Random(3), most_bytes=300)
        control.start()
        assert cut > 0
        assert b"0" in keys(control)
        assert b"49" not in keys(control)


def test_a_snapshot_is_what_an_rdb_server_goes_back_to(folder: Path) -> None:
    with server(folder, "rdb") as control:
        put(control, "before")
        control.save_snapshot()
        put(control, "after")
        restart(control)
        assert keys(control) == {b"before"}


def test_an_emptied_server_has_nothing(folder: Path) -> None:
    with server(folder, "everysec") as control:
        put(control, "a")
        control.kill()
        control.empty()
        control.start()
        assert keys(control) == set()


def test_a_frozen_server_answers_once_it_is_thawed(folder: Path) -> None:
    with server(folder, "none") as control:
        control.freeze()
        impatient = control.client(timeout_s=0.2)
        with contextlib.closing(impatient), pytest.raises((redis.TimeoutError, redis.ConnectionError)):
            impatient.ping()
        control.thaw()
        with contextlib.closing(control.client()) as client:
            assert client.ping()


@pytest.mark.parametrize("beyond", [-200_000, 10_000])
def test_a_full_server_takes_nothing_that_needs_memory_until_the_limit_is_lifted(folder: Path, beyond: int) -> None:
    with server(folder, "none") as control, contextlib.closing(control.client()) as client:
        put(control, "before")
        control.limit_memory(beyond)
        with pytest.raises(redis.OutOfMemoryError):
            put(control, *map(str, range(1000)))
        assert client.get("before") == b"x"
        client.delete("before")
        control.lift_limit()
        client.set("after", bytes(1000))
        assert b"before" not in keys(control)


def test_what_is_evicted_is_one_key_and_nothing_of_an_empty_server(folder: Path) -> None:
    with server(folder, "none") as control:
        put(control, "a", "b")
        name = control.evict(random.Random(0))
        assert keys(control) == {b"a", b"b"} - {name.encode()}
        control.evict(random.Random(0))
        assert control.evict(random.Random(0)) == ""


def test_what_a_server_holds_is_what_lies_there(folder: Path) -> None:
    with server(folder, "none") as control, contextlib.closing(control.client()) as client:
        before, names = held_bytes(client), [str(number) for number in range(100)]
        for name in names:
            client.set(name, bytes(10_000))
        assert 10**6 <= held_bytes(client) - before < 1.5 * 10**6
        client.delete(*names)
        assert held_bytes(client) - before < 0.5 * 10**6


def test_what_a_server_takes_to_rewrite_its_log_is_not_what_it_holds(folder: Path) -> None:
    with server(folder, "everysec") as control, contextlib.closing(control.client()) as client:
        client.mset(dict.fromkeys(map(str, range(10)), "x"))
        client.config_set("rdb-key-save-delay", 1_000_000)  # microseconds a key
        client.bgrewriteaof()
        client.set("meanwhile", "x")
        assert held_bytes(client) is None


def test_a_frozen_replica_lacks_what_came_meanwhile_once_it_is_promoted(folder: Path) -> None:
    with server(folder, "none") as primary:
        put(primary, "before")
        replica = RedisControl(folder / "r2", "none")
        replica.start()
        try:
            replica.follow(primary)
            replica.freeze()
            put(primary, "after")
            primary.kill()
            replica.thaw()
            replica.promote()
            put(replica, "writable")
            assert {b"before", b"writable"} <= keys(replica)
        finally:
            replica.close()


def test_a_proxy_cuts_loses_and_hides(folder: Path) -> None:
    with server(folder, "none") as control:
        proxy = Proxy(folder / "p", control.socket, hides_run_id=True)
        client, bare = connect(proxy.url, timeout_s=2.0), socket.socket(socket.AF_UNIX)
        try:
            # redis-py reads a number of nothing but digits as a number.
            assert client.info("server")["run_id"] in ("0" * 40, 0)
            bare.connect(proxy.url.removeprefix("unix://"))
            bare.sendall(b"PING\r\n")
            assert bare.recv(100) == b"+PONG\r\n"
            proxy.cut()
            assert bare.recv(100) == b""
            assert client.ping(), "new connections are served"
            proxy.lose_replies(1, to=b"INCRBY")
            with pytest.raises(redis.ConnectionError):
                client.incr("n")
            assert client.get("n") == b"1", "it arrived"
        finally:
            bare.close()
            client.close()
            proxy.close()
