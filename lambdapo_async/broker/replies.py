"""Replies of Redis, taken apart: what the protocol does not allow is a ``BrokerError``, and goes no further.

Redis answers as its data are, and anybody who may write there can leave there what is no number and no name.
"""

from collections.abc import Mapping

from lambdapo_async.errors import BrokerError


def as_text(value: object) -> str:
    """A name, or a number as text."""
    if isinstance(value, int):
        return str(value)
    try:
        return as_bytes(value).decode()
    except UnicodeDecodeError as error:
        raise _unexpected(value, "a text") from error


def as_number(value: object, name: str) -> int:
    """A number, which Redis keeps as text; ``name`` is what it has in the run's keys."""
    try:
        return int(value if isinstance(value, int) else as_bytes(value))
    except ValueError as error:
        raise BrokerError(f"{name} of the run is damaged in Redis: {value!r:.80} is no number") from error


def as_bytes(value: object) -> bytes:
    """A string."""
    if not isinstance(value, bytes):
        raise _unexpected(value, "a string")
    return value


def as_names(reply: object) -> list[str]:
    """Names that somebody else gave: what is no UTF-8 in them is shown as it is."""
    if not isinstance(reply, (list, set)):
        raise _unexpected(reply, "names")
    return [as_bytes(name).decode(errors="backslashreplace") for name in reply]


def as_fields(reply: object) -> Mapping[bytes, bytes]:
    """The fields of a hash, or of a stream's entry."""
    if not isinstance(reply, dict) or not all(isinstance(part, bytes) for pair in reply.items() for part in pair):
        raise _unexpected(reply, "fields")
    return reply


def as_values(reply: object, count: int) -> list[bytes | None]:
    """``count`` strings, None where there is none."""
    return [as_value(value) for value in exactly(reply, count)]


def as_value(value: object) -> bytes | None:
    """A string, or None where there is none."""
    return None if value is None else as_bytes(value)


def exactly(reply: object, count: int) -> list[object]:
    """A reply of ``count`` parts."""
    if not isinstance(reply, list) or len(reply) != count:
        raise _unexpected(reply, f"{count} values")
    return reply


def _unexpected(found: object, wanted: str) -> BrokerError:
    return BrokerError(f"Redis answered {found!r:.200} in place of {wanted}: the run's keys are damaged")
