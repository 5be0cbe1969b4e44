"""The actors' end of the queue in memory."""

from collections.abc import Sequence

from lambdapo_async.broker.interface import Delivery, Descriptor, EnqueueReply, EnqueueStatus, Marks
from lambdapo_async.errors import BrokerError
from tests.fakes_redis_run import FakeRedisRun


class FakeRolloutSink:
    """``interface.RolloutSink``"""

    def __init__(self, state: FakeRedisRun) -> None:
        self._state = state

    def enqueue(self, deliveries: Sequence[Delivery], *, epoch: str) -> EnqueueReply:
        state, producer = self._state, deliveries[0].descriptor.producer
        with state.lock:
            for place, each in enumerate(deliveries):
                status = self._status(each.descriptor, each.payload, epoch, is_first=place == 0)
                if status is EnqueueStatus.OK:
                    self._accept(each)
                elif status is not EnqueueStatus.DUP:
                    break
            return EnqueueReply(status, state.accepted.get(producer, 0), state.committed.get(producer, 0), state.epoch)

    def marks(self, producer: str) -> Marks:
        state = self._state
        with state.lock:
            accepted, committed = state.accepted.get(producer, 0), state.committed.get(producer, 0)
            return Marks(state.is_open, accepted, committed, state.epoch)

    def _status(self, descriptor: Descriptor, payload: bytes, epoch: str, *, is_first: bool) -> EnqueueStatus:
        state = self._state
        last = state.accepted.get(descriptor.producer, 0)
        if descriptor.seq <= last:
            return EnqueueStatus.DUP
        if not state.is_open or state.limits is None:
            return EnqueueStatus.WAIT
        if epoch != state.epoch:
            return EnqueueStatus.EPOCH
        if descriptor.seq != last + 1:
            return EnqueueStatus.GAP
        holder = state.held.get(descriptor.lease, (None,))[0]
        ours = holder is not None and f"{descriptor.producer}.".startswith(f"{holder}.")
        if (holder is not None and not ours) or descriptor.lease in state.answered:
            state.late += 1
            if ours:
                del state.held[descriptor.lease]
                state.admitted -= descriptor.lease.split == "train"
            return EnqueueStatus.LATE
        if len(payload) > state.limits.max_bytes and not is_first:
            return EnqueueStatus.FULL
        if len(payload) > state.limits.max_bytes:
            raise BrokerError(f"group {descriptor.lease.id} has {len(payload)} bytes, more than broker.max_bytes")
        if len(state.queue) >= state.limits.max_groups or state.num_bytes + len(payload) > state.limits.max_bytes:
            state.full += 1
            return EnqueueStatus.FULL
        return EnqueueStatus.OK

    def _accept(self, delivery: Delivery) -> None:
        state, descriptor, lease = self._state, delivery.descriptor, delivery.descriptor.lease
        if lease in state.held:
            del state.held[lease]
        elif lease in state.lines[lease.split]:
            state.lines[lease.split].remove(lease)
        elif lease.split == "train":
            state.admitted += 1
        state.queue.append(delivery)
        state.accepted[descriptor.producer] = descriptor.seq
        state.answered.add(lease)
