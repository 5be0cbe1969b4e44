"""The actor's side of delivery: one offer at a time, repeated with the same number until it is accepted."""

import asyncio
import logging

from lambdapo_async.broker.interface import Descriptor, EnqueueStatus, RolloutSink
from lambdapo_async.errors import BrokerUnavailable
from lambdapo_async.rollout import RolloutGroup
from lambdapo_async.seal import Seal
from lambdapo_async.wire import GROUP, encode_group

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0


class Outbox:
    """Numbers this producer's groups 1, 2, 3, ... and offers them in order."""

    def __init__(self, sink: RolloutSink, seal: Seal, *, producer: str, epoch: str, full_timeout_s: float) -> None:
        self._sink, self._seal = sink, seal
        self._producer, self._epoch = producer, epoch
        self._full_timeout_s = full_timeout_s
        self._last_seq = 0
        self._incarnation = 0
        self._one_offer = asyncio.Lock()
        self.sent = self.late = self.bytes_sent = self.restarts = 0

    async def send(self, group: RolloutGroup) -> None:
        """Return once the queue holds ``group``; the caller's slot stays taken until then (backpressure).

        Raises:
            BrokerUnavailable: Redis was gone, or the queue full, for longer than the deadline.
        """
        payload = await asyncio.to_thread(self._sealed, group)
        # A caller cancelled in the middle of an offer must not leave its number in doubt for the next one.
        await asyncio.shield(asyncio.ensure_future(self._deliver(group, payload)))

    def _sealed(self, group: RolloutGroup) -> bytes:
        return self._seal.close(encode_group(group), purpose=GROUP)

    async def _deliver(self, group: RolloutGroup, payload: bytes) -> None:
        async with self._one_offer:
            status = await self._offer(group, payload)
        if status is EnqueueStatus.LATE:
            self.late += 1
        else:
            self.sent += 1
            self.bytes_sent += len(payload)

    async def _offer(self, group: RolloutGroup, payload: bytes) -> EnqueueStatus:
        pause_s, waited_s = _FIRST_PAUSE_S, 0.0
        while True:
            descriptor = self._describe(group, payload)
            reply = await asyncio.to_thread(self._sink.enqueue, descriptor, payload, epoch=self._epoch)
            match reply.status:
                case EnqueueStatus.OK | EnqueueStatus.DUP:
                    self._last_seq = descriptor.seq
                    return reply.status
                case EnqueueStatus.LATE:  # the next group takes the number
                    return reply.status
                case EnqueueStatus.GAP | EnqueueStatus.EPOCH:
                    self._start_over(reply.status, reply.epoch)
                case EnqueueStatus.FULL:
                    if waited_s > self._full_timeout_s:
                        raise BrokerUnavailable(
                            f"the rollout queue was full for {waited_s:.0f} s: is the learner alive?"
                        )
                    await asyncio.sleep(pause_s)
                    waited_s += pause_s
                    pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _describe(self, group: RolloutGroup, payload: bytes) -> Descriptor:
        return Descriptor(
            producer=f"{self._producer}.{self._incarnation}",
            seq=self._last_seq + 1,
            lease=group.lease,
            min_version=group.min_version,
            num_bytes=len(payload),
            mean_reward=float(group.rewards.mean()),
        )

    def _start_over(self, status: EnqueueStatus, epoch: str) -> None:
        """Redis lost groups of ours or was declared untrustworthy: go on under a new producer name."""
        self.restarts += 1
        self._incarnation += 1
        self._last_seq, self._epoch = 0, epoch
        logger.warning("the queue answered %s: going on as producer %s.%d", status, self._producer, self._incarnation)
