"""Lua scripts: the only writers of state that two processes share."""

import functools
import hashlib
from collections.abc import Sequence
from importlib import resources
from typing import Any

import redis

from lambdapo_async.broker.client import Broker
from lambdapo_async.broker.replies import as_text
from lambdapo_async.broker.round_trip import Argument, Command, round_trip
from lambdapo_async.errors import BrokerError, FencedError, LostDataError

Reply = list[object]


class Script:
    """A Lua script of this package; sent once, then called by its hash."""

    def __init__(self, broker: Broker, name: str, *, fenced: bool = False, synced: bool = False) -> None:
        """Every script may ask for ``server_id()`` and ``now_ms()``.

        Args:
            broker: where it runs.
            name: its file, without suffix.
            fenced: KEYS[1] is the run's state and ARGV[1] our fence, checked before anything else.
            synced: fenced, and the queue must still be the one that its learner initialised (see synced.lua).
        """
        preludes = ["server", "lines", *(["fenced"] if fenced or synced else []), *(["synced"] if synced else [])]
        self._source = "".join(_read(part) for part in (*preludes, name))
        self._hash = hashlib.sha1(self._source.encode(), usedforsecurity=False).hexdigest()
        self._broker = broker

    def __call__(self, keys: Sequence[bytes], args: Sequence[Argument]) -> Reply:
        """The script's reply: a list, or the words of one string.

        Raises:
            FencedError: another learner owns the run.
            LostDataError: this Redis lost the run or a part of it.
            BrokerError: the script failed, or its reply is neither.
        """
        return self._send((), keys, args)[1]

    def after(
        self, commands: Sequence[Command], keys: Sequence[bytes], args: Sequence[Argument]
    ) -> tuple[list[Any], Reply]:
        """``commands`` and then the script, in one round trip: the replies of the first, and of the second.

        The commands must be idempotent like everything here. A refusal of the first or of the script is raised; one of
        another command is its reply, for the script sees what is missing.
        """
        return self._send(commands, keys, args)

    def _send(
        self, commands: Sequence[Command], keys: Sequence[bytes], args: Sequence[Argument]
    ) -> tuple[list[Any], Reply]:
        call = ("EVALSHA", self._hash, len(keys), *keys, *args)

        def send(client: redis.Redis) -> list[Any]:
            replies = round_trip(client, *commands, call)
            if isinstance(replies[-1], redis.exceptions.NoScriptError):  # the server is new, or restarted
                client.script_load(self._source)
                replies[-1:] = round_trip(client, call)
            for reply in (replies[0], replies[-1]):
                if isinstance(reply, redis.ResponseError):
                    raise reply
            return replies

        *replies, reply = self._broker.call(send)
        return replies, _checked(reply)


@functools.cache
def _read(part: str) -> str:
    return (resources.files("lambdapo_async.broker") / f"{part}.lua").read_text()


def _checked(reply: object) -> Reply:
    match reply:
        case [b"LOST", reason]:
            raise LostDataError(f"Redis is not as its learner left it: {as_text(reason)}")
        case [b"FENCED" | b"GONE", *stored]:
            raise fence_error(stored)
        case list():
            return reply
        case bytes():
            return [*reply.split(b" ")]
    raise BrokerError(f"a script of ours answered {reply!r:.200}")


def fence_error(stored: Sequence[object]) -> BrokerError:
    """What to raise when the run's fence is ``stored`` (empty: none) and not ours."""
    if not stored:
        return LostDataError("this Redis does not hold the run any more")
    return FencedError(f"another learner owns the run now (fence {as_text(stored[0])}): this one must stop")
