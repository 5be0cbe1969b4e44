"""Lua scripts: the only writers of state that two processes share."""

from collections.abc import Sequence
from importlib import resources

from lambdapo_async.broker.client import Broker
from lambdapo_async.errors import BrokerError, FencedError, LostDataError

Argument = bytes | memoryview | str | int | float


class Script:
    """A Lua script of this package; sent once, then called by its hash."""

    def __init__(self, broker: Broker, name: str, *, fenced: bool = False) -> None:
        """``fenced``: KEYS[1] is the run's state and ARGV[1] our fence, checked before anything else."""
        folder = resources.files("lambdapo_async.broker")
        prelude = (folder / "fenced.lua").read_text() if fenced else ""
        source = prelude + (folder / f"{name}.lua").read_text()
        self._broker = broker
        self._script = broker.call(lambda client: client.register_script(source))

    def __call__(self, keys: Sequence[bytes], args: Sequence[Argument]) -> list[bytes | int]:
        """The script's reply.

        Raises:
            FencedError: another learner owns the run.
            BrokerError: this Redis lost the run, or the script failed.
        """
        reply: list[bytes | int] = self._broker.call(lambda client: self._script(keys, args, client=client))
        if reply and reply[0] in (b"FENCED", b"GONE"):
            raise fence_error(reply[1:])
        return reply


def fence_error(stored: Sequence[bytes | int]) -> BrokerError:
    """What to raise when the run's fence is ``stored`` (empty: none) and not ours."""
    if not stored:
        return LostDataError("this Redis does not hold the run any more")
    return FencedError(f"another learner owns the run now (fence {as_text(stored[0])}): this one must stop")


def as_text(value: bytes | int) -> str:
    """A reply as text."""
    return value.decode() if isinstance(value, bytes) else str(value)
