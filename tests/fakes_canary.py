"""The canary's place in memory, held to the same tests as Redis."""

from lambdapo_async.errors import FencedError


class FakeCanaryStore:
    """``canary_store.CanaryStore``"""

    def __init__(self, *, fence: int = 1) -> None:
        self._fence = fence
        self._record: bytes | None = None
        self._is_asked = False
        self.wishes = 0

    def put_canary(self, record: bytes, *, fence: int) -> None:
        if fence != self._fence:
            raise FencedError(f"another learner owns the run now (fence {self._fence})")
        self._record, self._is_asked = record, False

    def canary(self) -> bytes | None:
        return self._record

    def ask_canary(self) -> None:
        self._is_asked = True
        self.wishes += 1

    def is_canary_asked(self) -> bool:
        return self._is_asked
