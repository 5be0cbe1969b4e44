"""What an actor's log says between its start and its end."""

import logging
import time
from collections.abc import Callable

from lambdapo_async.broker.heartbeat import Heartbeat

logger = logging.getLogger(__name__)

_EVERY_S = 60.0


class ProgressLog:
    """A line a minute, so that a person sees that the actor works, and how fast."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told_at = clock()

    def told(self, heartbeat: Heartbeat) -> Heartbeat:
        """``heartbeat``, after the line that may be due."""
        if self._clock() - self._told_at >= _EVERY_S:
            self._told_at = self._clock()
            logger.info(
                "%s: version %d, %d groups in flight, %d sent, %.0f tokens/s, idle %.0f %%",
                heartbeat.state, heartbeat.policy_version, heartbeat.groups_in_flight, heartbeat.groups_sent,
                heartbeat.tokens_per_s, 100 * heartbeat.idle_share,
            )  # fmt: skip
        return heartbeat
