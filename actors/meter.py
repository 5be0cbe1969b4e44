"""What an actor counts about itself, for its heartbeats."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

_RATE_WINDOW_S = 10.0
"""Tokens are counted when a group ends, so a rate over one heartbeat would jump."""


class EngineMeter:
    """Tokens sampled, and the share of time in which the engine had nothing to do."""

    def __init__(self) -> None:
        self.tokens = self.completions = 0
        self._running = 0
        self._idle_since: float | None = time.monotonic()
        self._idle_s = 0.0
        self._beat_at = time.monotonic()
        self._counts: deque[tuple[float, int]] = deque([(self._beat_at, 0)])

    @contextmanager
    def request(self) -> Iterator[None]:
        """Wraps one engine request."""
        self._settle_idle(time.monotonic())
        self._running += 1
        self._idle_since = None
        try:
            yield
        finally:
            self._running -= 1
            if self._running == 0:
                self._idle_since = time.monotonic()

    def count(self, completions: int, tokens: int) -> None:
        """Add what a request returned."""
        self.completions += completions
        self.tokens += tokens

    def beat(self) -> tuple[float, float]:
        """(tokens per second over the last ten seconds, idle share since the last call)."""
        now = time.monotonic()
        self._settle_idle(now)
        idle_share = min(self._idle_s / max(now - self._beat_at, 1e-9), 1.0)
        self._beat_at, self._idle_s = now, 0.0
        self._counts.append((now, self.tokens))
        while self._counts[1][0] <= now - _RATE_WINDOW_S:
            self._counts.popleft()
        started, tokens = self._counts[0]
        return (self.tokens - tokens) / max(now - started, 1e-9), idle_share

    def _settle_idle(self, now: float) -> None:
        if self._idle_since is not None:
            self._idle_s += now - self._idle_since
            self._idle_since = now
