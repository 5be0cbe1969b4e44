"""What an actor counts about itself, for its heartbeats."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_WINDOW_S = 10.0
"""Tokens are counted when a group ends, so a rate over one heartbeat would jump. And the learner reads heartbeats when
a step ends, at which the gate is often shut: idleness at that moment is not that of the step."""


class EngineMeter:
    """Tokens sampled, and the share of time in which the engine had nothing to do."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.tokens = self.completions = 0
        self._clock = clock
        self._running = 0
        self._idle_since: float | None = clock()
        self._idle_s = 0.0
        self._beats: deque[tuple[float, int, float]] = deque([(clock(), 0, 0.0)])
        """(when, tokens and idle seconds so far), oldest first."""

    @contextmanager
    def request(self) -> Iterator[None]:
        """Wraps one engine request."""
        self._settle_idle(self._clock())
        self._running += 1
        self._idle_since = None
        try:
            yield
        finally:
            self._running -= 1
            if self._running == 0:
                self._idle_since = self._clock()

    def count(self, completions: int, tokens: int) -> None:
        """Add what a request returned."""
        self.completions += completions
        self.tokens += tokens

    def beat(self) -> tuple[float, float]:
        """(tokens per second, idle share), both over the last ten seconds."""
        now = self._clock()
        self._settle_idle(now)
        self._beats.append((now, self.tokens, self._idle_s))
        while self._beats[1][0] <= now - _WINDOW_S:
            self._beats.popleft()
        started, tokens, idle_s = self._beats[0]
        elapsed_s = max(now - started, 1e-9)
        return (self.tokens - tokens) / elapsed_s, min((self._idle_s - idle_s) / elapsed_s, 1.0)

    def _settle_idle(self, now: float) -> None:
        if self._idle_since is not None:
            self._idle_s += now - self._idle_since
            self._idle_since = now
