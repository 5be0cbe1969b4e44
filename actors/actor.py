"""One actor: lease prompts, sample groups, reward them, send them; follow the weights all the while."""

import asyncio
import contextlib
import functools
import logging
import os
import socket
import time
from typing import Literal

from actors.engine import CUT_OFF_S
from actors.holding import Holding, HoldLimits
from actors.meter import EngineMeter
from actors.orphans import Orphans
from actors.parts import ActorParts
from actors.progress import ProgressLog
from actors.prompts import Prompt
from actors.sampled import Sampled
from actors.sampler import Sampler
from actors.vigil import Vigil
from lambdapo_async.broker.heartbeat import Heartbeat
from lambdapo_async.errors import BrokerError, RunNotFoundError
from lambdapo_async.rollout import Lease

logger = logging.getLogger(__name__)

_GATE_POLL_S = 0.1


class Actor:
    """Runs until the run is finished or :meth:`drain` is called; the first failure of a loop ends it."""

    def __init__(self, parts: ActorParts) -> None:
        self._parts = parts
        self._config = parts.config
        self._meter = EngineMeter()
        self._progress = ProgressLog()
        self._sampler = Sampler(parts.engine, self._meter, parts.config)
        self._holding = Holding(HoldLimits.of(parts.config))
        self._in_flight: dict[Lease, asyncio.Task[None]] = {}
        self._delivering: set[Lease] = set()
        self._owed: set[Lease] = set()
        self._unsent: dict[Lease, Sampled] = {}
        self._draining = asyncio.Event()
        self._slot_freed = asyncio.Event()
        self._lost_leases = 0
        self._is_set_aside = False
        self._orphans = Orphans(parts.orphans, beat_s=parts.config.broker.heartbeat_s)
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
            await self._orphans.close(is_run_finished=self._is_run_finished)
            await self._parts.outbox.close(is_run_finished=self._is_run_finished)

    async def _run_loops(self) -> None:
        """The first failure of a loop cancels the others."""
        async with asyncio.TaskGroup() as loops:
            background = [
                loops.create_task(self._parts.follower.follow(), name="follow_weights"),
                loops.create_task(self._parts.canary.watch(), name="watch_canary"),
                loops.create_task(self._beat(), name="beat"),
                loops.create_task(self._keep_outbox(), name="keep_outbox"),
                loops.create_task(self._orphans.send(), name="send_orphans"),
            ]
            await self._answer_leases()
            for task in background:
                task.cancel()

    async def _answer_leases(self) -> None:
        """Keep as many groups going as suit this actor's speed.

        consumes: leases    waits for: the admission gate, a free slot    unblocks: the learner's next batch
        """
        async with asyncio.TaskGroup() as groups:
            while not self._draining.is_set():
                now = time.monotonic()
                self._holding.saw_version(self._parts.engine.policy_version, now)
                leases = await self._lease(self._holding.target(now) - len(self._in_flight))
                for lease in leases:
                    # One that expired while Redis did not answer may come back to us, who never stopped answering it.
                    if lease not in self._in_flight:
                        self._holding.leased(lease, now)
                        task = groups.create_task(self._answer(lease), name=lease.id)
                        self._in_flight[lease] = task
                        self._owed.add(lease)
                        task.add_done_callback(functools.partial(self._forget, lease))
                if not leases:
                    await self._wait_for_room()
            await self._finish_or_cancel()

    async def _lease(self, free: int) -> tuple[Lease, ...]:
        # A prompt leased while newer weights are on their way would be answered by the old ones.
        if free <= 0 or self._parts.follower.is_behind or not self._parts.canary.is_admitted:
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
        is_answered = not answer.cancelled() and answer.exception() is None and lease not in self._unsent
        self._holding.ended(lease, time.monotonic(), is_delivered=is_answered)
        self._delivering.discard(lease)
        if is_answered:
            self._owed.discard(lease)
        self._slot_freed.set()

    async def _answer(self, lease: Lease) -> None:
        """One lease, from prompt to delivered group."""
        prompt = await self._prompt_of(lease)
        version = self._parts.engine.policy_version
        begun = await asyncio.to_thread(self._parts.handoff.take, lease, prompt, version=version)
        started = time.monotonic()
        sampled = await self._sampler.sample(prompt, begun)
        sampled_at = time.monotonic()
        self._unsent[lease] = sampled
        if sampled.is_cut_off:
            return  # the lease is still owed: signing off hands it back, with what there is
        lengths = [len(each.token_ids) for each in sampled.completions]
        self._holding.sampled(lease, lengths, sampling_s=sampled_at - started)
        texts = await asyncio.to_thread(self._parts.prompts.decode, sampled.completions)
        scores = await self._parts.scorer.score(prompt.row, texts)
        scoring_s = time.monotonic() - sampled_at
        group = sampled.rewarded(lease, self._parts.actor_id, texts, scores, scoring_s=scoring_s)
        self._delivering.add(lease)
        del self._unsent[lease]  # the outbox keeps it from here on
        await self._parts.outbox.send(group)
        await asyncio.to_thread(self._parts.handoff.done, lease)

    async def _prompt_of(self, lease: Lease) -> Prompt:
        """Redis may have come back empty since it granted the lease; its learner writes the rows again."""
        deadline = time.monotonic() + self._config.broker.outage_s
        while True:
            try:
                return await asyncio.to_thread(self._parts.prompts.of, lease)
            except RunNotFoundError:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(_GATE_POLL_S)

    async def _finish_or_cancel(self) -> None:
        """Give running groups ``drain_s``; the leases of those that are cut off are handed back at sign-off."""
        if not self._in_flight or self._is_run_finished:  # then nobody waits for them
            self._cancel_groups()
            return
        await asyncio.wait(list(self._in_flight.values()), timeout=self._config.actor.drain_s)
        sampling = [task for lease, task in self._in_flight.items() if lease not in self._unsent]
        if sampling and self._config.actor.handoff:
            await self._parts.engine.abort_all()  # each returns what it has
            await asyncio.wait(sampling, timeout=CUT_OFF_S)
        self._cancel_groups()

    def _cancel_groups(self) -> None:
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
            self._is_set_aside = await asyncio.to_thread(parts.fleet.beat, self._progress.told(self._heartbeat()))
            if self._is_set_aside:
                parts.canary.doubt()
            held = list(self._in_flight)
            for lease in await asyncio.to_thread(parts.admission.renew, held) if held else ():
                self._drop_lost(lease)
            if await self._vigil.is_run_finished():
                logger.info("the run is finished")
                self._is_run_finished = True
                self.drain()
            await asyncio.sleep(beat_s)

    async def _keep_outbox(self) -> None:
        """Forget what the learner holds, offer again what Redis lost.

        waits for: the learner's commits    unblocks: the disk
        """
        while True:
            await asyncio.sleep(self._config.broker.heartbeat_s)
            await self._parts.outbox.poll()

    def _drop_lost(self, lease: Lease) -> None:
        """Somebody else answers it now. A group accepted a moment ago is no longer leased either: not lost."""
        task = self._in_flight.get(lease)
        if task is not None and lease not in self._delivering:
            self._lost_leases += 1
            self._unsent.pop(lease, None)
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
            state=self._state(),
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
                **parts.handoff.counters(),
                "groups_to_hold": self._holding.target(time.monotonic()),
                "groups_late": parts.outbox.late,
                "groups_unconfirmed": parts.outbox.unconfirmed,
                "groups_adopted": self._orphans.unconfirmed,
                "orphan_failures": self._orphans.failures,
                "outbox_restarts": parts.outbox.restarts,
                "leases_lost": self._lost_leases,
                "scoring_timeouts": parts.scorer.failures,
            },
            sent_at=time.time(),
        )

    def _state(self) -> Literal["starting", "sampling", "quarantined", "draining"]:
        if self._draining.is_set():
            return "draining"
        if self._is_set_aside:
            return "quarantined"
        return "sampling" if self._parts.canary.is_admitted else "starting"

    async def _sign_off(self) -> None:
        """Hand back what was not answered, see our groups confirmed, and leave the fleet."""
        if self._leasing is not None:
            self._owed |= set(await self._leasing)
        if self._owed:
            logger.info("handing back %d unanswered leases", len(self._owed))
            await asyncio.to_thread(self._parts.handoff.leave, self._unsent)
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
