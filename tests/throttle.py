"""How slowly a proxy forwards what passes through it."""

import math
import threading

_FAST, _SLOW = 1 << 16, 1 << 14


class Throttle:
    """Each direction of each connection gets ``bytes_per_s``; without limits at first."""

    def __init__(self) -> None:
        self._bytes_per_s, self._delay_s = math.inf, 0.0
        self._is_closed = threading.Event()

    @property
    def block(self) -> int:
        """Bytes to take at once: few where few may pass."""
        return _FAST if self._bytes_per_s == math.inf else _SLOW

    def slow_down(self, bytes_per_s: float, *, delay_s: float = 0.0) -> None:
        """From now on; ``delay_s`` is between a request and its reply."""
        self._bytes_per_s, self._delay_s = bytes_per_s, delay_s

    def full_speed(self) -> None:
        self._bytes_per_s, self._delay_s = math.inf, 0.0

    def let_pass(self, num_bytes: int, *, is_reply: bool) -> None:
        """Return once these bytes may go on."""
        pause_s = num_bytes / self._bytes_per_s + (self._delay_s if is_reply else 0.0)
        if pause_s > 0.0:
            self._is_closed.wait(pause_s)

    def close(self) -> None:
        """Whoever waits goes on."""
        self._is_closed.set()
