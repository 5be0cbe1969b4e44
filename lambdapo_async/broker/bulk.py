"""Large values straight from the socket into memory: what a client library copies three times is copied once."""

import socket
from collections.abc import Sequence

import redis

_SHORTEST_REPLY = 5
"""Bytes that every answer to GET has at least: ``$-1\\r\\n``."""
_LONGEST_LINE = 512


def get_into(client: redis.Redis, keys: Sequence[bytes], views: Sequence[memoryview]) -> int:
    """GET all ``keys`` in one round trip, each value into its view.

    Returns:
        How many values are there, counted from the first; less than asked for if the next one is missing, has
        another length than its view, or the server refused it: asking for it plainly will tell.

    Raises:
        redis.ConnectionError, redis.TimeoutError: the connection broke; views hold anything.
    """
    connection = client.connection_pool.get_connection()
    num_received = 0
    try:
        connection.send_packed_command(connection.pack_commands([("GET", key) for key in keys]))  # type: ignore[no-untyped-call]
        sock = connection._sock  # nothing is buffered beside it: every earlier reply was read to its end
        assert sock is not None
        while num_received < len(keys) and _receive(sock, views[num_received]):
            num_received += 1
    except TimeoutError as error:
        raise redis.TimeoutError(f"no answer to GET: {error}") from error
    except OSError as error:
        raise redis.ConnectionError(f"the connection broke during GET: {error}") from error
    finally:
        if num_received < len(keys):
            connection.disconnect()  # type: ignore[no-untyped-call] # replies that nobody read are on it
        client.connection_pool.release(connection)
    return num_received


def _receive(sock: socket.socket, view: memoryview) -> bool:
    """Whether the next reply is a value of ``len(view)`` bytes; then it is in ``view``."""
    if _line(sock) != b"$%d\r\n" % len(view):
        return False
    _fill(sock, view)
    _fill(sock, memoryview(bytearray(2)))  # the value's own \r\n
    return True


def _line(sock: socket.socket) -> bytes:
    line = bytearray(_SHORTEST_REPLY)
    _fill(sock, memoryview(line))
    while not line.endswith(b"\n") and len(line) < _LONGEST_LINE:
        line += _some(sock, memoryview(bytearray(1)))
    return bytes(line)


def _fill(sock: socket.socket, view: memoryview) -> None:
    while len(view):
        view = view[len(_some(sock, view)) :]


def _some(sock: socket.socket, view: memoryview) -> memoryview:
    """The part of ``view`` that one read filled."""
    num_bytes = sock.recv_into(view)
    if num_bytes == 0:
        raise ConnectionResetError("the server closed it")
    return view[:num_bytes]
