"""Whether anybody still drives the run: an actor waits for a while, never for ever."""

import asyncio
import logging
import time

from lambdapo_async.broker.interface import RunStore
from lambdapo_async.errors import BrokerUnavailable, RunNotFoundError

logger = logging.getLogger(__name__)


class Vigil:
    """Looks at the run once a beat: weights, an open gate, room in the queue, only a learner brings them."""

    def __init__(self, run_store: RunStore, *, outage_s: float) -> None:
        """``outage_s``: how long the run, or its learner's sign of life, may be missing."""
        self._run_store, self._outage_s = run_store, outage_s
        self._gone_since: float | None = None

    async def is_run_finished(self) -> bool:
        """Whether the learner said so.

        Raises:
            BrokerUnavailable: the run or its learner was gone for longer than ``outage_s``.
        """
        try:
            state = await asyncio.to_thread(self._run_store.state)
        except RunNotFoundError as error:  # Redis came back empty: the learner will publish again
            self._count_absence(error)
            return False
        self._gone_since = None
        if state.phase != "finished" and state.learner_silent_s > self._outage_s:
            raise BrokerUnavailable(
                f"the learner has given no sign of life for {state.learner_silent_s:.0f} s (broker.outage_s = "
                f"{self._outage_s:g}): start it again with --resume, then this actor"
            )
        return state.phase == "finished"

    def _count_absence(self, error: RunNotFoundError) -> None:
        now = time.monotonic()
        if self._gone_since is None:
            self._gone_since = now
            logger.warning("%s; waiting for its learner to publish it again", error)
        if now - self._gone_since > self._outage_s:
            raise BrokerUnavailable(f"{error} (for broker.outage_s = {self._outage_s:g} s)") from error
