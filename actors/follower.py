"""Keeps the engine on the newest weights: wait, catch up beside the sampling, swap."""

import asyncio
import logging
import time
from collections.abc import Mapping
from pathlib import Path

from actors.engine import InferenceEngine
from actors.mirror import Mirror
from lambdapo_async.broker.interface import WeightStore
from lambdapo_async.config import RunConfig
from lambdapo_async.errors import WeightsError, WeightsGoneError, WeightsLostError
from lambdapo_async.weights.catch_up import Available, plan_catch_up
from lambdapo_async.weights.tensor_file import Payload

logger = logging.getLogger(__name__)

_WAIT_S = 1.0
_HOLD_S = 1.0
_FAILURES_BEFORE_GIVING_UP = 2
_BEATS_OF_GRACE = 2


class WeightFollower:
    """Follows the head; a version is adopted whole or not at all."""

    def __init__(
        self, store: WeightStore, engine: InferenceEngine, *, run_id: str, folder: Path, config: RunConfig
    ) -> None:
        """``folder`` gets the mirror; ``staleness.max_staleness``, ``broker.heartbeat_s`` and
        ``learner.data_timeout_s``, which is how long weights may be gone, or every file replaced before it is here,
        are used."""
        self._store, self._engine = store, engine
        self.mirror = Mirror(folder, run_id=run_id)
        """What the engine loads from."""
        self._never_behind = config.staleness.max_staleness == 0
        self._grace_s = _BEATS_OF_GRACE * config.broker.heartbeat_s
        self._outage_s = config.learner.data_timeout_s
        self._behind_since: float | None = None
        self._gone_since: float | None = None
        self._overtaken_since: float | None = None
        self._loading = self._failed = False
        self._checksum: str | None = None
        self._failures_in_a_row = 0
        self._updates = self._failures = self._overtaken = self._keyframes = 0
        self._num_files = self._chain_length = self._num_bytes = 0
        self._fetch_s = self._pause_s = 0.0
        self.changed = asyncio.Event()
        """Set at every adopted version; whoever waits for it clears it."""

    @property
    def is_behind(self) -> bool:
        """Whether a prompt leased now should rather wait for newer weights.

        They are a moment away on a fast link, and on a slow one the engine must not starve meanwhile; unless the run
        allows no staleness at all.
        """
        if self._engine.policy_version < 0 or self._loading or self._failed:
            return True
        if self._behind_since is None:
            return False
        return self._never_behind or time.monotonic() - self._behind_since < _HOLD_S

    def checksum_of(self, version: int) -> str | None:
        """``xxh3_128:<hex>`` of the state the engine was given as ``version``; None if it samples under another."""
        return self._checksum if version == self._engine.policy_version else None

    def counters(self) -> Mapping[str, float]:
        """For the heartbeat: totals since the start, except for ``weight_chain``."""
        return {
            "weight_updates": self._updates,
            "weight_failures": self._failures,
            "weight_overtaken": self._overtaken,  # files that a newer version replaced before they were here
            "weights_failed": float(self._failed),  # no way to the newest weights was found, twice in a row
            "weight_keyframes": self._keyframes,
            "weight_files": self._num_files,
            "weight_chain": self._chain_length,  # files of the last update
            "weight_bytes": self._num_bytes,
            "weight_fetch_s": self._fetch_s,
            "weight_decode_s": self.mirror.decode_s,
            "weight_apply_s": self.mirror.apply_s,
            "weight_pause_s": self._pause_s,
        }

    async def follow(self) -> None:
        """Adopt every newest version, until cancelled.

        consumes: weight heads    waits for: a head above the engine's version    unblocks: sampling

        Raises:
            WeightsError: twice in a row the weights were damaged or not to be reached, Redis had lost the run's for too
                long, or newer ones replaced each file for as long; the last beats have said so.
            EngineError: a swap failed; the engine is dead.
        """
        while True:
            head = await asyncio.to_thread(self._store.wait_newer, self._engine.policy_version, timeout_s=_WAIT_S)
            if head is not None:
                await self._adopt_or_count(head)
            else:
                await self._check_gone()

    async def _adopt_or_count(self, head: int) -> None:
        try:
            await self._adopt(head)
        except WeightsError as error:
            known = await asyncio.to_thread(self._store.head)
            if isinstance(error, WeightsGoneError) and known is not None and known > head:
                await self._note_overtaken(known, error)
                return
            self.mirror.drop()
            self._failures += 1
            if known is None or known < head or isinstance(error, WeightsLostError):
                await self._note_gone(head, error, is_listed=known == head)
                return
            # One failure may be a file deleted under our hands; twice in a row the weights are not to be had.
            self._failures_in_a_row += 1
            logger.warning("version %d was not adopted (%d in a row): %s", head, self._failures_in_a_row, error)
            if self._failures_in_a_row >= _FAILURES_BEFORE_GIVING_UP:
                await self._give_up()
                raise
        else:
            self._failures_in_a_row, self._gone_since, self._overtaken_since = 0, None, None

    async def _note_gone(self, head: int, error: WeightsError, *, is_listed: bool) -> None:
        """Redis lost everything, its newest second, or a part of ``head``, which the learner finds when it looks next:
        what it publishes again gets a number of its own.

        The first time another way may lead there, from a keyframe; the second time none does before that number.
        """
        is_first = self._gone_since is None
        self._gone_since = self._gone_since or time.monotonic()
        logger.warning("the run's weights are gone: waiting for the learner to publish again (%s)", error)
        if is_first or not is_listed:
            return
        while await asyncio.to_thread(self._store.wait_newer, head, timeout_s=_WAIT_S) is None:
            await self._check_gone()

    async def _check_gone(self) -> None:
        """Give up if the weights are gone for longer than an outage may last."""
        if self._gone_since is not None and time.monotonic() - self._gone_since > self._outage_s:
            await self._give_up()
            raise WeightsError(
                f"the run's weights went, and did not come back within learner.data_timeout_s = {self._outage_s:g} s: "
                "is the learner alive, and does Redis keep what it is given (maxmemory-policy noeviction)?"
            )

    async def _note_overtaken(self, head: int, error: WeightsGoneError) -> None:
        """A newer version took a file off the store's list, which is nobody's fault; what the mirror has is whole, and
        the next plan starts there."""
        self._overtaken += 1
        self._overtaken_since = self._overtaken_since or time.monotonic()
        logger.info("%s; planning again, for version %d", error, head)
        if time.monotonic() - self._overtaken_since > self._outage_s:
            await self._give_up()
            raise WeightsError(
                f"for learner.data_timeout_s = {self._outage_s:g} s every version was replaced before all of its files "
                f"were here, the last one by {head}: raise weights.grace_s, or give this actor a faster link"
            ) from error

    async def _give_up(self) -> None:
        """Lease nothing more, and say so for some beats."""
        self._failed = True
        await asyncio.sleep(self._grace_s)

    async def _adopt(self, head: int) -> None:
        if self._behind_since is None:
            self._behind_since = time.monotonic()
        await asyncio.to_thread(self._catch_up, head)
        self._loading = True
        try:
            self._pause_s += await self._engine.load_weights(head, self.mirror.path, changed=self.mirror.changed)
        finally:
            self._loading = False
        self.mirror.mark_loaded()
        self._checksum = self.mirror.checksum
        self._updates += 1
        self._behind_since = None
        self.changed.set()
        logger.debug("sampling under version %d", head)

    def _catch_up(self, head: int) -> None:
        """Bring the mirror to ``head``, with the fewest bytes; in a thread, beside the sampling."""
        plan = plan_catch_up(self._store.files(), at=self.mirror.version, head=head)
        for file in plan.files:
            payload = self._fetch(file)
            self.mirror.advance(file, payload)
        self._chain_length = len(plan.files)

    def _fetch(self, file: Available) -> Payload:
        started = time.monotonic()
        payload = self._store.fetch(file)
        self._fetch_s += time.monotonic() - started
        self._num_bytes += len(payload)
        self._num_files += 1
        self._keyframes += file.base_version is None
        return payload
