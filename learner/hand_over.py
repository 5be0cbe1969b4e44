"""From the thread that reads the queue to the learner's loop: in order, bounded in bytes, blocking on both sides."""

import threading
from collections import deque

from learner.arrivals import Arrival


class HandOver:
    """Holds what arrived and was not taken.

    Args:
        max_bytes: what it holds at most, or one group that is larger.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._arrivals: deque[Arrival] = deque()
        self._num_bytes = 0
        self._trouble: BaseException | None = None
        self._error: BaseException | None = None
        self._is_closed = False
        self._changed = threading.Condition()

    @property
    def num_bytes(self) -> int:
        """Bytes that wait to be taken."""
        return self._num_bytes

    def put(self, arrival: Arrival, *, timeout_s: float) -> bool:
        """Append, as soon as there is room; False if there was none for ``timeout_s``. Once closed, it does nothing."""
        with self._changed:
            is_free = self._changed.wait_for(lambda: self._is_closed or self._has_room(arrival), timeout=timeout_s)
            if is_free and not self._is_closed:
                self._arrivals.append(arrival)
                self._num_bytes += arrival.num_bytes
                self._changed.notify_all()
            return is_free

    def take(self, *, timeout_s: float) -> Arrival | None:
        """The oldest; None after ``timeout_s``. An error of the other side is raised once all before it was taken."""
        with self._changed:
            self._changed.wait_for(lambda: self._arrivals or self._problem is not None, timeout=timeout_s)
            if self._arrivals:
                arrival = self._arrivals.popleft()
                self._num_bytes -= arrival.num_bytes
                self._changed.notify_all()
                return arrival
            if self._problem is not None:
                raise self._problem
            return None

    def pause(self, error: BaseException) -> None:
        """Let the other side know ``error``, and wait until it is dealt with, or until all is closed."""
        with self._changed:
            self._trouble = error
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_closed or self._trouble is None)

    def go_on(self) -> None:
        """What :meth:`pause` said is dealt with."""
        with self._changed:
            self._trouble = None
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Let the other side know that nothing will ever follow."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def close(self) -> None:
        """Let go of whoever waits to append."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    @property
    def _problem(self) -> BaseException | None:
        return self._error or self._trouble

    def _has_room(self, arrival: Arrival) -> bool:
        return not self._num_bytes or self._num_bytes + arrival.num_bytes <= self._max_bytes
