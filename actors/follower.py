"""Keeps the engine on the newest weights: wait, fetch, verify, swap."""

import asyncio
import logging
import time
from pathlib import Path

from actors.engine import InferenceEngine
from lambdapo_async.broker.interface import WeightStore
from lambdapo_async.errors import WeightsError
from lambdapo_async.weights.safetensors_file import verify_payload

logger = logging.getLogger(__name__)

_WAIT_S = 1.0
_FAILURES_BEFORE_GIVING_UP = 2


class WeightFollower:
    """Follows the head; a version is adopted whole or not at all."""

    def __init__(self, store: WeightStore, engine: InferenceEngine, *, run_id: str, folder: Path) -> None:
        self._store, self._engine = store, engine
        self._run_id, self._folder = run_id, folder
        self._failures = 0
        self.is_behind = True
        """Whether newer weights than the engine's are known of; True before the first."""
        self.changed = asyncio.Event()
        """Set at every adopted version; whoever waits for it clears it."""
        self.updates = 0
        self.fetch_s = self.pause_s = 0.0

    async def follow(self) -> None:
        """Adopt every newest version, until cancelled.

        consumes: weight heads    waits for: a head above the engine's version    unblocks: sampling
        """
        while True:
            head = await asyncio.to_thread(self._store.wait_newer, self._engine.policy_version, timeout_s=_WAIT_S)
            if head is not None:
                self.is_behind = True
                await self._adopt_or_count(head)

    async def _adopt_or_count(self, version: int) -> None:
        try:
            await self._adopt(version)
        except WeightsError as error:
            # One failure may be a version deleted under our hands; twice in a row the weights are not to be had.
            self._failures += 1
            logger.warning("version %d was not adopted (%d in a row): %s", version, self._failures, error)
            if self._failures >= _FAILURES_BEFORE_GIVING_UP:
                raise
        else:
            self._failures = 0

    async def _adopt(self, version: int) -> None:
        started = time.monotonic()
        path = await asyncio.to_thread(self._fetch, version)
        self.fetch_s += time.monotonic() - started
        try:
            self.pause_s += await self._engine.load_weights(version, path)
        finally:
            path.unlink(missing_ok=True)
        self.updates += 1
        self.is_behind = False
        self.changed.set()
        logger.debug("sampling under version %d", version)

    def _fetch(self, version: int) -> Path:
        payload = self._store.fetch(version)
        verify_payload(payload, run_id=self._run_id, version=version)
        path = self._folder / f"weights-{version}.safetensors"
        path.write_bytes(payload)
        return path
