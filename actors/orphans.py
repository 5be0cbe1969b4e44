"""What dead actors of this run left on this machine, on its way to the learner."""

import asyncio
import logging
from collections.abc import Sequence

from actors.outbox import Outbox
from lambdapo_async.errors import LambdaPOError

logger = logging.getLogger(__name__)

_LONGEST_PAUSE_S = 60.0


class Orphans:
    """Outboxes of dead actors. None waits for another, and what befalls one is a warning, never our end."""

    def __init__(self, outboxes: Sequence[Outbox], *, beat_s: float) -> None:
        self._outboxes, self._beat_s = list(outboxes), beat_s
        self.failures = 0

    @property
    def unconfirmed(self) -> int:
        """Groups that the learner does not hold durably yet."""
        return sum(outbox.unconfirmed for outbox in self._outboxes)

    async def send(self) -> None:
        """Offer what they left until the learner has it.

        waits for: the learner's commits    unblocks: the disk
        """
        async with asyncio.TaskGroup() as tasks:
            for outbox in self._outboxes:
                tasks.create_task(self._send(outbox), name=f"send_{outbox.producer}")

    async def close(self, *, is_run_finished: bool) -> None:
        """What is not confirmed stays on the disk for the next actor."""
        while self._outboxes:
            outbox = self._outboxes.pop()
            try:
                await outbox.close(is_run_finished=is_run_finished)
            except LambdaPOError as error:
                self._failed(outbox, error)

    async def _send(self, outbox: Outbox) -> None:
        pause_s = self._beat_s
        while outbox in self._outboxes:
            await asyncio.sleep(pause_s)
            try:
                await outbox.poll()
                if outbox.unconfirmed == 0:
                    self._outboxes.remove(outbox)
                    await outbox.close(is_run_finished=False)
                pause_s = self._beat_s
            except LambdaPOError as error:
                self._failed(outbox, error)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _failed(self, outbox: Outbox, error: LambdaPOError) -> None:
        self.failures += 1
        logger.warning("%d groups of %s, which died, are not sent yet: %s", outbox.unconfirmed, outbox.producer, error)
