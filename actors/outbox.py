"""The actor's side of delivery: a group is kept until the learner holds it durably, and offered until then."""

import asyncio
import itertools
import logging
import time
from dataclasses import dataclass, replace

from actors.spool import Spool
from lambdapo_async.broker.interface import Delivery, Descriptor, EnqueueReply, EnqueueStatus, RolloutSink
from lambdapo_async.errors import BrokerUnavailable, ConfigError, WireFormatError
from lambdapo_async.rollout import RolloutGroup
from lambdapo_async.wire import decode_group, encode_group

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0
_MISSING_S = 60.0
"""Redis asks for numbers that we no longer have: the learner may still tell it better."""
AT_ONCE, AT_ONCE_BYTES = 64, 4 * 1024**2
"""Groups in one round trip, and their bytes; a larger one goes alone."""
_ANY = 2**31 - 1  # a spool was written by an actor of this run; its learner checks ids and versions


@dataclass(slots=True, eq=False)
class _Parcel:
    """A group on its way; ``descriptor`` bears the number it is offered under."""

    descriptor: Descriptor
    payload: bytes | None = None
    """None once it was accepted, and of a dead actor's: it lies in the spool, should it be offered again."""
    is_settled: bool = False
    """Whether it was accepted once, or is too late: its sender need not wait any longer."""
    is_late: bool = False

    @property
    def seq(self) -> int:
        return self.descriptor.seq


class Outbox:
    """Numbers one producer's groups 1, 2, 3, ... and offers them in order, all that wait at once.

    Redis may lose what it accepted, even everything: then it says so, and gets it again.
    """

    def __init__(self, sink: RolloutSink, spool: Spool, *, epoch: str, outage_s: float) -> None:
        """``outage_s``: how long the queue may refuse a group before the sender gives up."""
        self._sink, self._spool = sink, spool
        self._epoch, self._outage_s = epoch, outage_s
        self._parcels: list[_Parcel] = []
        self._accepted, self._at_once = 0, AT_ONCE
        self._one_offer, self._numbering = asyncio.Lock(), asyncio.Lock()
        self.sent = self.late = self.restarts = 0

    @classmethod
    def adopted(cls, sink: RolloutSink, spool: Spool, *, epoch: str, outage_s: float) -> "Outbox":
        """The outbox of an actor that died; :meth:`poll` offers what it left behind."""
        outbox = cls(sink, spool, epoch=epoch, outage_s=outage_s)
        for seq in spool.sequence_numbers():
            payload = spool.read(seq)
            try:
                group = decode_group(payload, vocab_size=_ANY, max_version=_ANY)
            except WireFormatError as error:
                logger.warning("%s: deleted group %d, which is damaged: %s", spool.folder, seq, error)
                spool.delete(seq)
                continue
            outbox._parcels.append(_Parcel(outbox._describe(group, payload, seq)))
        if outbox._parcels:
            outbox._accepted = outbox._parcels[0].seq - 1
        logger.info("adopted %d groups of %s, which died", len(outbox._parcels), spool.producer)
        return outbox

    @property
    def producer(self) -> str:
        """Whose groups they are."""
        return self._spool.producer

    @property
    def unconfirmed(self) -> int:
        """Groups that the learner does not hold durably yet."""
        return len(self._parcels)

    async def send(self, group: RolloutGroup) -> None:
        """Return once the queue holds ``group``; the caller's slot stays taken until then (backpressure).

        Raises:
            BrokerUnavailable: Redis was gone, or refused the group, for longer than the deadline.
            ConfigError: the spool's disk is full.
        """
        payload = await asyncio.to_thread(encode_group, group)
        # A caller cancelled in the middle of an offer must not leave its number in doubt for the next one.
        delivery = asyncio.ensure_future(self._keep_and_deliver(group, payload))
        try:
            await asyncio.shield(delivery)
        except asyncio.CancelledError:
            delivery.add_done_callback(_say_if_failed)
            raise

    async def poll(self) -> None:
        """Ask what is durable and forget it; offer again what Redis lost. Cheap, and nothing while nothing is kept."""
        if not self._parcels or self._one_offer.locked():
            return
        async with self._one_offer:
            marks = await asyncio.to_thread(self._sink.marks, self._spool.producer)
            if not marks.is_open:
                return
            await self._trim(marks.committed)
            self._go_to(marks.last, marks.epoch)
            while self._next_parcel() is not None:
                await self._offer_next()

    async def close(self, *, is_run_finished: bool) -> None:
        """Forget what nobody will ask for any more; the rest stays on the disk for the next actor."""
        if is_run_finished:
            await self._trim(self._accepted)
        num_left = await asyncio.to_thread(self._spool.close)
        if num_left:
            logger.warning(
                "%d groups are not confirmed: they stay in %s for the next actor of this run here",
                num_left, self._spool.folder,
            )  # fmt: skip

    async def _keep_and_deliver(self, group: RolloutGroup, payload: bytes) -> None:
        async with self._numbering:
            parcel = _Parcel(self._describe(group, payload, self._last_number + 1), payload)
            await asyncio.to_thread(self._spool.write, parcel.seq, payload)
            self._parcels.append(parcel)
        async with self._one_offer:
            while not parcel.is_settled:
                await self._offer_next()
        if parcel.is_late:
            self.late += 1
        else:
            self.sent += 1

    async def _offer_next(self) -> None:
        """Offer what the queue does not have, until its answer changes what comes next."""
        started, pause_s = time.monotonic(), _FIRST_PAUSE_S
        while first := self._next_parcel():
            reply = await asyncio.to_thread(self._sink.enqueue, await self._deliveries(), epoch=self._epoch)
            await self._trim(reply.committed)
            # A full queue takes one at a time: what is sent with it in vain would be sent again and again.
            is_closed = reply.status in (EnqueueStatus.FULL, EnqueueStatus.WAIT)
            self._at_once = 1 if is_closed else min(2 * self._at_once, AT_ONCE)
            match reply.status:
                case EnqueueStatus.OK | EnqueueStatus.DUP:
                    return self._accept(max(first.seq, reply.last))
                case EnqueueStatus.LATE if late := self._parcel(reply.last + 1):
                    self._accept(reply.last)
                    return await self._drop(late)
                case EnqueueStatus.FULL if reply.last >= first.seq:
                    return self._accept(reply.last)
                case EnqueueStatus.GAP | EnqueueStatus.EPOCH if self._parcel(reply.last + 1):
                    return self._go_to(reply.last, reply.epoch)
            refused_s = time.monotonic() - started
            if reply.status is EnqueueStatus.GAP and refused_s > min(_MISSING_S, self._outage_s):
                return await self._become_another(reply)
            if refused_s > self._outage_s:
                raise BrokerUnavailable(
                    f"the rollout queue answered {reply.status} for {refused_s:.0f} s (broker.outage_s = "
                    f"{self._outage_s:g}): is the learner alive?"
                )
            self._epoch = reply.epoch
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _next_parcel(self) -> _Parcel | None:
        return next((parcel for parcel in self._parcels if parcel.seq > self._accepted), None)

    async def _deliveries(self) -> list[Delivery]:
        """The first that the queue does not have, and what of those behind it may go at once."""
        waiting = [parcel for parcel in self._parcels if parcel.seq > self._accepted][: self._at_once]
        sizes = itertools.accumulate(parcel.descriptor.num_bytes for parcel in waiting)
        found: list[Delivery] = []
        for parcel, size in zip(waiting, sizes, strict=True):
            if found and size > AT_ONCE_BYTES:
                break
            try:
                found.append(Delivery(parcel.descriptor, await self._payload_of(parcel)))
            except ConfigError:
                if not found:
                    raise
                break  # a file that cannot be read holds up those behind it, not those before
        return found

    async def _payload_of(self, parcel: _Parcel) -> bytes:
        if parcel.payload is None:
            return await asyncio.to_thread(self._spool.read, parcel.seq)
        return parcel.payload

    def _parcel(self, seq: int) -> _Parcel | None:
        return next((parcel for parcel in self._parcels if parcel.seq == seq), None)

    def _accept(self, last: int) -> None:
        self._accepted = max(self._accepted, min(last, self._last_number))
        for parcel in self._parcels:
            if parcel.seq <= self._accepted:
                parcel.is_settled, parcel.payload = True, None

    @property
    def _last_number(self) -> int:
        return self._parcels[-1].seq if self._parcels else self._accepted

    def _go_to(self, last: int, epoch: str) -> None:
        """The queue has our groups up to ``last``: less than it had before when Redis lost some."""
        if last < self._accepted or epoch != self._epoch:
            self.restarts += 1
            logger.warning(
                "Redis lost groups of %s: it has %d of %d, and gets the others again",
                self._spool.producer, last, self._accepted,
            )  # fmt: skip
            self._accepted = max(last, self._parcels[0].seq - 1) if self._parcels else last
        self._epoch = epoch
        self._accept(last)

    async def _trim(self, committed: int) -> None:
        """Forget what is durable at the learner."""
        durable = [parcel.seq for parcel in self._parcels if parcel.seq <= committed]
        if durable:
            self._accept(committed)
            self._parcels = [parcel for parcel in self._parcels if parcel.seq > committed]
            await asyncio.to_thread(self._spool.delete, *durable)

    async def _drop(self, late: _Parcel) -> None:
        """Somebody else answers that prompt: its number is free, the groups behind it move up."""
        late.is_settled = late.is_late = True
        async with self._numbering:
            self._parcels.remove(late)
            await asyncio.to_thread(self._spool.delete, late.seq)
            await self._number_from(self._accepted + 1)

    async def _become_another(self, reply: EnqueueReply) -> None:
        """The last resort: nobody will ever have the numbers that the queue asks for."""
        name, _, number = self._spool.producer.rpartition(".")
        logger.warning(
            "the queue asks for group %d of %s, which is gone: going on as %s.%d",
            reply.last + 1, self._spool.producer, name, int(number) + 1,
        )  # fmt: skip
        self.restarts += 1
        async with self._numbering:
            await asyncio.to_thread(self._spool.rename, f"{name}.{int(number) + 1}")
            self._accepted = 0
            await self._number_from(1)

    async def _number_from(self, first: int) -> None:
        """Number what the queue does not have consecutively; a file is renamed before it is offered."""
        waiting = [parcel for parcel in self._parcels if parcel.seq > self._accepted]
        for seq, parcel in enumerate(waiting, start=first):
            if parcel.seq != seq:
                await asyncio.to_thread(self._spool.renumber, parcel.seq, seq)
            parcel.descriptor = replace(parcel.descriptor, producer=self._spool.producer, seq=seq)

    def _describe(self, group: RolloutGroup, payload: bytes, seq: int) -> Descriptor:
        return Descriptor(
            producer=self._spool.producer,
            seq=seq,
            lease=group.lease,
            min_version=group.min_version,
            num_bytes=len(payload),
            mean_reward=float(group.rewards.mean()),
        )


def _say_if_failed(delivery: asyncio.Future[None]) -> None:
    """Its sender is gone and will not hear of it; the group lies in the spool."""
    if not delivery.cancelled() and (error := delivery.exception()) is not None:
        logger.warning("a group was not delivered: %s", error)
