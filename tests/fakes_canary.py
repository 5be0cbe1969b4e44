"""The canary's place in memory, held to the same tests as Redis."""

from collections.abc import Callable

from lambdapo_async.errors import FencedError


def _belongs_to_1(fence: int) -> None:
    if fence != 1:
        raise FencedError("another learner owns the run now (fence 1)")


class FakeCanaryStore:
    """``canary_store.CanaryStore``"""

    def __init__(self, check_fence: Callable[[int], None] = _belongs_to_1) -> None:
        self._check_fence = check_fence
        self._record: bytes | None = None
        self._is_asked = False
        self.wishes = 0

    def put_canary(self, record: bytes, *, fence: int) -> None:
        self._check_fence(fence)
        self._record, self._is_asked = record, False

    def canary(self) -> bytes | None:
        return self._record

    def ask_canary(self) -> None:
        self._is_asked = True
        self.wishes += 1

    def is_canary_asked(self) -> bool:
        return self._is_asked
