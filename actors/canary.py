"""The actor's side of the canary: no lease before its numbers are the learner's, and a new look every so often."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from actors.engine import EngineInfo
from lambdapo_async.errors import WeightsError
from lambdapo_async.rollout import LogProbs
from lambdapo_async.weights.canary import Canary, CanaryError, CanaryVerdict, ModelIdentity, compare
from lambdapo_async.weights.canary_store import CanaryStore

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_SOONEST_S = 5.0
"""Between two comparisons, however much the actor is doubted."""


class ScoringEngine(Protocol):
    """The part of ``InferenceEngine`` that the canary needs."""

    @property
    def info(self) -> EngineInfo:
        """Name, device and dtype."""

    @property
    def policy_version(self) -> int:
        """Version of the weights loaded last; -1 before the first."""

    async def score(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> LogProbs:
        """[C] float32 log pi of the completion's tokens at temperature 1."""


class ActorCanary:
    """Compares this actor with its learner, under one version of the weights."""

    def __init__(
        self,
        store: CanaryStore,
        engine: ScoringEngine,
        identity: ModelIdentity,
        *,
        checksum_of: Callable[[int], str | None],
        every_s: float,
        timeout_s: float,
    ) -> None:
        """Looks at nothing yet.

        Args:
            identity: of the model files that this actor was started with.
            checksum_of: checksum of the actor's weights at a version; None if it does not hold that one.
            every_s: seconds between two comparisons.
            timeout_s: deadline of one comparison, from asking the learner to the verdict.
        """
        self._store, self._engine, self._identity = store, engine, identity
        self._checksum_of = checksum_of
        self._timeout_s = timeout_s
        self.every_s = every_s
        """Seconds between two comparisons."""
        self._verdict: CanaryVerdict | None = None
        self._doubted = asyncio.Event()
        self._checks = self._failures = 0

    @property
    def is_admitted(self) -> bool:
        """Whether a comparison has passed: before that nothing may be leased."""
        return self._verdict is not None and self._verdict.is_passed

    def counters(self) -> Mapping[str, float]:
        """For the heartbeat."""
        gaps = {}
        if self._verdict is not None:
            gaps = {"canary_mean_gap": self._verdict.mean_gap, "canary_max_gap": self._verdict.max_gap}
        return {**gaps, "canary_checks": self._checks, "canary_failures": self._failures}

    async def watch(self) -> None:
        """Compare now and every ``every_s`` seconds, until cancelled.

        consumes: canaries    waits for: one of the engine's version    unblocks: the first lease

        Raises:
            CanaryError: this actor does not sample from the learner's policy, or no canary came in time.
        """
        while True:
            await self.compare()
            pause_s = min(_SOONEST_S, self.every_s)
            await asyncio.sleep(pause_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._doubted.wait(), self.every_s - pause_s)
            self._doubted.clear()

    def doubt(self) -> None:
        """The learner has set this actor aside: compare soon, for nothing else brings it back."""
        self._doubted.set()

    async def compare(self) -> CanaryVerdict:
        """One comparison; see :meth:`watch`."""
        try:
            async with asyncio.timeout(self._timeout_s):
                verdict = await self._verdict_of_one_version()
            self._verdict = verdict
            verdict.check()
        except TimeoutError as error:
            self._failures += 1
            raise CanaryError(
                f"no canary of the weights this actor holds (version {self._engine.policy_version}) came within "
                f"{self._timeout_s:g} s of asking: is the learner alive?"
            ) from error
        except WeightsError:
            self._failures += 1
            raise
        self._checks += 1
        logger.info(
            "version %d: %.2g nats per token from the learner, %.2g at most",
            verdict.version, verdict.mean_gap, verdict.max_gap,
        )  # fmt: skip
        return verdict

    async def _verdict_of_one_version(self) -> CanaryVerdict:
        while True:
            canary = await self._canary_of_our_version()
            checksum = self._checksum_of(canary.version)
            if checksum is not None:
                canary.check_identity(self._identity, checksum=checksum)
                # Asked for together: new weights come before or after all of them, not in between.
                scores = (self._engine.score(row.prompt_ids, row.completion_ids) for row in canary.rows)
                scored = await asyncio.gather(*scores)
                if self._engine.policy_version == canary.version:
                    return compare(canary, scored, dtype=self._engine.info.dtype)
            await asyncio.sleep(_POLL_S)  # new weights came in between: the next canary will fit

    async def _canary_of_our_version(self) -> Canary:
        """Asks until the learner's canary and the engine's weights meet at one version."""
        while True:
            record = await asyncio.to_thread(self._store.canary)
            canary = None if record is None else Canary.from_bytes(record)
            version = self._engine.policy_version
            if canary is not None and canary.version == version:
                return canary
            if version >= 0 and (canary is None or canary.version < version):
                await asyncio.to_thread(self._store.ask_canary)
            await asyncio.sleep(_POLL_S)
