"""Where the learner leaves its canary, and where actors ask for one of the present version."""

from typing import Protocol

from lambdapo_async.broker.client import Broker
from lambdapo_async.broker.script import Script
from lambdapo_async.keys import RunKeys


class CanaryStore(Protocol):
    """One record and one wish; the record is ``canary.Canary.to_bytes``."""

    def put_canary(self, record: bytes, *, fence: int) -> None:
        """Replace the record and fulfil the wish; ``FencedError`` once another learner came."""

    def canary(self) -> bytes | None:
        """The newest record; None before the first."""

    def ask_canary(self) -> None:
        """Wish for a canary of the present version; any number of wishes are one."""

    def is_canary_asked(self) -> bool:
        """Whether somebody wished for one since the last."""


class RedisCanaryStore:
    """``CanaryStore`` of one run."""

    def __init__(self, broker: Broker, keys: RunKeys) -> None:
        self._broker, self._keys = broker, keys
        self._put = Script(broker, "weights_canary", fenced=True)

    def put_canary(self, record: bytes, *, fence: int) -> None:
        """See ``CanaryStore``."""
        keys = self._keys
        self._put([keys.state, keys.weights_canary, keys.weights_canary_wish], [fence, record])

    def canary(self) -> bytes | None:
        """See ``CanaryStore``."""
        record: bytes | None = self._broker.call(lambda client: client.get(self._keys.weights_canary))
        return record

    def ask_canary(self) -> None:
        """See ``CanaryStore``."""
        self._broker.call(lambda client: client.set(self._keys.weights_canary_wish, 1))

    def is_canary_asked(self) -> bool:
        """See ``CanaryStore``."""
        return bool(self._broker.call(lambda client: client.exists(self._keys.weights_canary_wish)))
