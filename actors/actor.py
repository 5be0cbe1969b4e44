"""One actor: lease prompts, sample groups, reward them, send them; follow the weights all the while."""

import asyncio
import contextlib
import functools
import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from actors.canary import ActorCanary
from actors.engine import Completion, InferenceEngine
from actors.follower import WeightFollower
from actors.meter import EngineMeter
from actors.outbox import Outbox
from actors.prompts import LeasedPrompts, Prompt
from actors.scoring import Scorer
from actors.vigil import Vigil
from lambdapo_async.broker.interface import Admission, Fleet, Heartbeat, RunStore
from lambdapo_async.config import RunConfig
from lambdapo_async.errors import BrokerError, EngineError
from lambdapo_async.rollout import Lease, Rollout, RolloutGroup, Timing
from lambdapo_async.tasks.interface import Scored

logger = logging.getLogger(__name__)

_GATE_POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorParts:
    """Everything an actor is put together from."""

    actor_id: str
    config: RunConfig
    engine: InferenceEngine
    follower: WeightFollower
    canary: ActorCanary
    prompts: LeasedPrompts
    scorer: Scorer
    outbox: Outbox
    orphans: tuple[Outbox, ...]
    """What dead actors of this run left on this machine."""
    admission: Admission
    fleet: Fleet
    run_store: RunStore
    hurry: Callable[[], None]
    """From now on no call waits long for Redis: we are leaving."""


class Actor:
    """Runs until the run is finished or :meth:`drain` is called; the first failure of a loop ends it."""

    def __init__(self, parts: ActorParts) -> None:
        self._parts = parts
        self._config = parts.config
        self._meter = EngineMeter()
        self._in_flight: dict[Lease, asyncio.Task[None]] = {}
        self._delivering: set[Lease] = set()
        self._owed: set[Lease] = set()
        self._draining = asyncio.Event()
        self._slot_freed = asyncio.Event()
        self._lost_leases = 0
        self._orphans = list(parts.orphans)
        self._leasing: asyncio.Future[tuple[Lease, ...]] | None = None
        self._vigil = Vigil(parts.run_store, outage_s=parts.config.broker.outage_s)
        self._is_run_finished = False

    def drain(self) -> None:
        """Lease nothing more, send what is finished, hand the rest back, end. Idempotent."""
        self._draining.set()
        self._parts.hurry()

    async def run(self) -> None:
        """Sample until drained.

        Raises:
            EngineError, BrokerError, WeightsError, TaskError: what the first failed loop raised.
        """
        try:
            await self._run_loops()
        except BaseExceptionGroup as group:
            self._parts.hurry()
            with contextlib.suppress(BrokerError):  # Redis may be what failed, and then leases expire by themselves
                await self._sign_off()
            raise _first_cause(group) from group
        else:
            await self._sign_off()
        finally:
            for outbox in (self._parts.outbox, *self._orphans):
                await outbox.close(is_run_finished=self._is_run_finished)

    async def _run_loops(self) -> None:
        """The first failure of a loop cancels the others."""
        async with asyncio.TaskGroup() as loops:
            background = [
                loops.create_task(self._parts.follower.follow(), name="follow_weights"),
                loops.create_task(self._parts.canary.watch(), name="watch_canary"),
                loops.create_task(self._beat(), name="beat"),
                loops.create_task(self._keep_outboxes(), name="keep_outboxes"),
            ]
            await self._sample()
            for task in background:
                task.cancel()

    async def _sample(self) -> None:
        """Keep ``groups_in_flight`` groups going.

        consumes: leases    waits for: the admission gate, a free slot    unblocks: the learner's next batch
        """
        async with asyncio.TaskGroup() as groups:
            while not self._draining.is_set():
                free = self._config.actor.groups_in_flight - len(self._in_flight)
                leases = await self._lease(free)
                for lease in leases:
                    task = groups.create_task(self._answer(lease), name=lease.id)
                    self._in_flight[lease] = task
                    self._owed.add(lease)
                    task.add_done_callback(functools.partial(self._forget, lease))
                if not leases:
                    await self._wait_for_room()
            await self._finish_or_cancel()

    async def _lease(self, free: int) -> tuple[Lease, ...]:
        # A prompt leased while newer weights are on their way would be answered by the old ones.
        if free == 0 or self._parts.follower.is_behind or not self._parts.canary.is_admitted:
            return ()
        # Kept where a cancellation does not lose what was granted meanwhile.
        self._leasing = asyncio.ensure_future(asyncio.to_thread(self._parts.admission.lease, free))
        leases = await asyncio.shield(self._leasing)
        self._leasing = None
        return leases

    async def _wait_for_room(self) -> None:
        """Until a slot is free, new weights came (they open the gate), we drain, or a moment passed."""
        events = (self._slot_freed, self._parts.follower.changed, self._draining)
        waits = [asyncio.ensure_future(event.wait()) for event in events]
        await asyncio.wait(waits, timeout=_GATE_POLL_S, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        self._slot_freed.clear()
        self._parts.follower.changed.clear()

    def _forget(self, lease: Lease, answer: asyncio.Task[None]) -> None:
        self._in_flight.pop(lease, None)
        self._delivering.discard(lease)
        if not answer.cancelled() and answer.exception() is None:
            self._owed.discard(lease)
        self._slot_freed.set()

    async def _answer(self, lease: Lease) -> None:
        """One lease, from prompt to delivered group."""
        prompt = await asyncio.to_thread(self._parts.prompts.of, lease)
        started_at, started = time.time(), time.monotonic()
        with self._meter.request():
            completions = await self._sample_group(prompt)
        sampled = time.monotonic()
        self._meter.count(len(completions), sum(len(completion.token_ids) for completion in completions))
        if any(completion.finish_reason == "abort" for completion in completions):
            await asyncio.to_thread(self._parts.admission.hand_back, [lease])
            return
        texts = await asyncio.to_thread(self._parts.prompts.decode, completions)
        scores = await self._parts.scorer.score(prompt.row, texts)
        timing = Timing(started_at=started_at, generation_s=sampled - started, scoring_s=time.monotonic() - sampled)
        self._delivering.add(lease)
        await self._parts.outbox.send(self._group(lease, prompt, completions, texts, scores, timing))

    async def _sample_group(self, prompt: Prompt) -> tuple[Completion, ...]:
        deadline_s = self._config.actor.group_timeout_s
        try:
            async with asyncio.timeout(deadline_s):
                return await self._parts.engine.sample_group(
                    prompt.token_ids.tolist(), size=prompt.num_samples, sampling=self._config.sampling
                )
        except TimeoutError as error:
            raise EngineError(f"a group was not sampled within actor.group_timeout_s = {deadline_s:g} s") from error

    def _group(
        self,
        lease: Lease,
        prompt: Prompt,
        completions: tuple[Completion, ...],
        texts: list[str],
        scores: list[Scored],
        timing: Timing,
    ) -> RolloutGroup:
        rollouts = tuple(
            Rollout(
                completion_ids=completion.token_ids,
                behavior_logprobs=completion.logprobs,
                version_spans=completion.version_spans,
                finish_reason=completion.finish_reason,
                text=text,
                reward=scored.reward,
                reward_parts=scored.parts,
            )
            for completion, text, scored in zip(completions, texts, scores, strict=True)
        )
        return RolloutGroup(
            lease=lease,
            prompt_ids=prompt.token_ids,
            rollouts=rollouts,
            actor_id=self._parts.actor_id,
            timing=timing,
        )

    async def _finish_or_cancel(self) -> None:
        """Give running groups ``drain_s``; the leases of those that are cut off are handed back at sign-off."""
        if not self._in_flight:
            return
        await asyncio.wait(list(self._in_flight.values()), timeout=self._config.actor.drain_s)
        for task in self._in_flight.values():
            task.cancel()

    async def _beat(self) -> None:
        """Say that we live, renew our leases, notice the end of the run.

        waits for: the next beat    unblocks: lease expiry of the dead, the drain at the end

        Raises:
            BrokerUnavailable: the run or its learner was gone for too long.
        """
        parts, beat_s = self._parts, self._config.broker.heartbeat_s
        while True:
            await asyncio.to_thread(parts.fleet.beat, self._heartbeat())
            held = list(self._in_flight)
            for lease in await asyncio.to_thread(parts.admission.renew, held) if held else ():
                self._drop_lost(lease)
            if await self._vigil.is_run_finished():
                logger.info("the run is finished")
                self._is_run_finished = True
                self.drain()
            await asyncio.sleep(beat_s)

    async def _keep_outboxes(self) -> None:
        """Forget what the learner holds, offer again what Redis lost, and send what dead actors left behind.

        waits for: the learner's commits    unblocks: the disk
        """
        while True:
            await asyncio.sleep(self._config.broker.heartbeat_s)
            await self._parts.outbox.poll()
            for orphan in list(self._orphans):
                await orphan.poll()
                if orphan.unconfirmed == 0:
                    self._orphans.remove(orphan)
                    await orphan.close(is_run_finished=False)

    def _drop_lost(self, lease: Lease) -> None:
        """Somebody else answers it now. A group accepted a moment ago is no longer leased either: not lost."""
        task = self._in_flight.get(lease)
        if task is not None and lease not in self._delivering:
            self._lost_leases += 1
            self._owed.discard(lease)
            task.cancel()

    def _heartbeat(self) -> Heartbeat:
        parts = self._parts
        tokens_per_s, idle_share = self._meter.beat()
        info = parts.engine.info
        return Heartbeat(
            actor_id=parts.actor_id,
            host=socket.gethostname()[:256],
            pid=os.getpid(),
            state="draining" if self._draining.is_set() else "sampling" if parts.canary.is_admitted else "starting",
            device=info.device,
            dtype=info.dtype,
            engine=info.name,
            policy_version=parts.engine.policy_version,
            groups_in_flight=len(self._in_flight),
            groups_sent=parts.outbox.sent,
            completions=self._meter.completions,
            tokens=self._meter.tokens,
            tokens_per_s=tokens_per_s,
            idle_share=idle_share,
            counters={
                **parts.follower.counters(),
                **parts.canary.counters(),
                "groups_late": parts.outbox.late,
                "groups_unconfirmed": parts.outbox.unconfirmed,
                "groups_adopted": sum(orphan.unconfirmed for orphan in self._orphans),
                "outbox_restarts": parts.outbox.restarts,
                "leases_lost": self._lost_leases,
                "scoring_timeouts": parts.scorer.failures,
            },
            sent_at=time.time(),
        )

    async def _sign_off(self) -> None:
        """Hand back what was not answered, see our groups confirmed, and leave the fleet."""
        if self._leasing is not None:
            self._owed |= set(await self._leasing)
        if self._owed:
            logger.info("handing back %d unanswered leases", len(self._owed))
            await asyncio.to_thread(self._parts.admission.hand_back, sorted(self._owed, key=lambda lease: lease.index))
        await self._confirm()
        await asyncio.to_thread(self._parts.fleet.leave, self._parts.actor_id)

    async def _confirm(self) -> None:
        """Give the learner a moment to make our last groups durable; the spool keeps them otherwise."""
        deadline = time.monotonic() + min(self._config.actor.drain_s, 2 * self._config.broker.heartbeat_s)
        outbox = self._parts.outbox
        while outbox.unconfirmed and not self._is_run_finished and time.monotonic() < deadline:
            await outbox.poll()
            await asyncio.sleep(_GATE_POLL_S)


def _first_cause(error: BaseException) -> BaseException:
    """The exception that a tree of exception groups began with."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
