"""Several commands and their replies in one round trip."""

from collections.abc import Sequence
from typing import Any

import redis
from redis.connection import ConnectionInterface

Argument = bytes | memoryview | str | int | float
Command = Sequence[Argument]


def round_trip(client: redis.Redis, *commands: Command) -> list[Any]:
    """The replies to ``commands`` as the server gave them; a refusal is the ``redis.ResponseError`` itself.

    redis-py's own pipeline sends the same bytes, but spends more processor time on a script call than the server does.

    Raises:
        redis.RedisError: the connection broke.
    """
    pool = client.connection_pool
    connection = pool.get_connection()
    replies: list[Any] = []
    try:
        connection.send_packed_command(connection.pack_commands(commands))  # type: ignore[no-untyped-call]
        while len(replies) < len(commands):
            replies.append(_read(connection))
    finally:
        if len(replies) < len(commands):
            connection.disconnect()  # type: ignore[no-untyped-call] # replies that nobody read are on it
        pool.release(connection)
    return replies


def _read(connection: ConnectionInterface) -> object:
    try:
        return connection.read_response()
    except redis.ResponseError as refusal:
        return refusal
