"""The broker's conversations with a Redis whose every answer may be wrong: of another type, length or value."""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgpack
import redis

from lambdapo_async.broker.admission import RedisAdmission
from lambdapo_async.broker.client import Broker
from lambdapo_async.broker.fleet import RedisFleet
from lambdapo_async.broker.fleet_control import RedisFleetControl
from lambdapo_async.broker.interface import Delivery, Descriptor
from lambdapo_async.broker.ownership import Ownership
from lambdapo_async.broker.partials import RedisPartials
from lambdapo_async.broker.rollout_sink import RedisRolloutSink
from lambdapo_async.broker.rollout_source import RedisRolloutSource
from lambdapo_async.broker.run_store import PROTOCOL_SCHEMA, RedisRunStore
from lambdapo_async.config.weights import WeightsConfig
from lambdapo_async.errors import BrokerUnavailable
from lambdapo_async.keys import RunKeys
from lambdapo_async.rollout import Lease
from lambdapo_async.seal import Seal
from lambdapo_async.weights.manifest import Manifest, pack_available
from lambdapo_async.weights.redis_store import RedisWeightStore
from tests.contract.broker_world import LIMITS, durable
from tests.contract.test_broker_run import heartbeat
from tests.fuzz.mutation import Ours, Together, spoiled
from tests.weight_files import full

KEYS = RunKeys("r")
SEAL = Seal("a key that no mutation finds", run_id="r")  # or a manifest could name a file of this machine
LEASE = Lease("train", 0)
DESCRIPTOR = Descriptor("a.0", 1, LEASE, 0, 7, 0.5)
_ROUND_TRIPS = ("send", "look", "measure")
"""Functions of the broker that send several commands and return the reply to each."""
ENTRY = (b"1-0", {b"p": b"a.0", b"s": b"1", b"l": b"train:0:0", b"v": b"0", b"n": b"7", b"r": b"0.5"})


class AnsweringBroker(Broker):
    """Gives the answers that it was given, in their order, until there are no more, or none to what it is asked."""

    def __init__(self, answers: Sequence[object]) -> None:
        super().__init__("unix:///nowhere", timeout_s=1.0)
        self._answers = iter(answers)

    def call(self, operation: Callable[[redis.Redis], object]) -> object:
        for answer in self._answers:
            is_round_trip = operation.__name__ in _ROUND_TRIPS
            if isinstance(answer, Together) and is_round_trip:
                return [_unwrapped(one) for one in answer]
            if not isinstance(answer, Together) and not is_round_trip:
                return _unwrapped(answer)
            break
        raise BrokerUnavailable("it has no answer to this")


def _unwrapped(answer: object) -> object:
    return answer.result if isinstance(answer, Ours) else answer


@dataclass(frozen=True, slots=True)
class Conversation:
    """Calls of one seam, and what a healthy Redis answers."""

    name: str
    hold: Callable[[Broker], object]
    answers: tuple[object, ...]

    def __call__(self, content: bytes) -> object:
        """Hold it, with answers spoiled as ``content`` decides; empty: as they are."""
        source, answers = random.Random(content), list(self.answers)
        for _ in range(source.randrange(1, 3) if content else 0):
            place = source.choice([place for place, one in enumerate(answers) if not isinstance(one, Ours)])
            answers[place] = spoiled(answers[place], source)
        return self.hold(AnsweringBroker(answers))


def conversations() -> tuple[Conversation, ...]:
    """All of them."""
    return _sink(), _admission(), _source(), _run_store(), _fleet(), _partials(), _weights_read(), _weights_written()


def _script(*reply: object) -> Together:
    return Together([list(reply)])


def _sink() -> Conversation:
    def hold(broker: Broker) -> object:
        sink = RedisRolloutSink(broker, KEYS, SEAL)
        return sink.enqueue([Delivery(DESCRIPTOR, b"payload")], epoch="e"), sink.marks("a.0")

    return Conversation("sink", hold, (Together([True, [b"OK", 1, 0, b"e"]]), _script(b"OK", 1, 0, b"e")))


def _admission() -> Conversation:
    def hold(broker: Broker) -> object:
        admission = RedisAdmission(broker, KEYS, "a")
        granted = admission.lease(2)
        lost = admission.renew(granted)
        admission.hand_back(lost)
        return granted

    return Conversation("admission", hold, (_script(b"train:0:0", b"heldout:5:2"), _script(b"train:0:0"), _script()))


def _source() -> Conversation:
    def hold(broker: Broker) -> object:
        source = RedisRolloutSource(broker, KEYS, Ownership(broker, KEYS), 1, LIMITS)
        source.initialise(durable())
        (delivery,) = source.read(8, timeout_s=0.0) or [None]
        source.commit({"a.0": 1})
        source.quarantine(DESCRIPTOR, b"payload", "a reason")
        source.request_evaluation([Lease("heldout", 2, 5)])
        return delivery, source.stats()

    settled = (
        _script(b"OK", b"e"), [b"a.0"], [ENTRY], Together([7]), [], Ours(None), Ours(0),
        _script(b"OK"), _script(b"OK"), _script(b"OK", 1),
    )  # fmt: skip
    read = ([[b"q", [ENTRY]]], Together([[b"payload"], [b"OK"]]))
    after = (_script(b"OK", 2), _script(b"OK"), _script(b"OK"), Together([[b"1", b"0", None, *5 * [b"2"]], 0, 1, 0]))
    return Conversation("source", hold, (*settled, *read, *after))


def _run_store() -> Conversation:
    def hold(broker: Broker) -> object:
        store = RedisRunStore(broker, KEYS, Ownership(broker, KEYS), SEAL)
        store.create(b"{}", {"config.json": b"{}"}, fence=1)
        store.set_phase("running", fence=1)
        return store.config_json(), store.model_files(), store.num_rows("train")

    seen = Together([[b"%d" % PROTOCOL_SCHEMA, b"running", b"e", b"3", b"1000"], Ours((2, 5))])
    config = SEAL.close(b"{}", purpose="config")
    answers = (_script(b"OK", b"e"), Ours(None), _script(b"OK"), seen, config, {b"config.json": b"{}"}, b"600")
    return Conversation("run_store", hold, answers)


def _fleet() -> Conversation:
    def hold(broker: Broker) -> object:
        fleet, control = RedisFleet(broker, KEYS), RedisFleetControl(broker, KEYS, 1)
        fleet.beat(heartbeat("a"))
        members = fleet.members()
        control.quarantine(control.quarantined())
        control.readmit(["a"])
        return members

    record = msgpack.packb(heartbeat("a").model_dump())
    return Conversation("fleet", hold, (_script(0), _script(record), {b"a"}, _script(b"OK"), _script(b"OK")))


def _partials() -> Conversation:
    def hold(broker: Broker) -> object:
        partials = RedisPartials(broker, KEYS, "a")
        return partials.leave(LEASE, b"payload"), partials.take(LEASE)

    return Conversation("partials", hold, (_script(b"OK"), _script(b"payload")))


def _weights_read() -> Conversation:
    file = full(3)

    def hold(broker: Broker) -> object:
        store = RedisWeightStore(broker, KEYS, WeightsConfig(), SEAL)
        return store.wait_newer(2, timeout_s=0.0), store.files(), store.fetch(file.available)

    manifest = Manifest.in_chunks(file).signed_for(file, SEAL).pack(SEAL)
    followed = ([(b"1-0", {b"v": b"3"})], b"3", {b"3.full": pack_available(file.available)})
    fetched = (_script(1), manifest, _script(1), Ours(0), file.payload, Ours(1))
    return Conversation("weights_read", hold, (*followed, *fetched))


def _weights_written() -> Conversation:
    old, new = full(3), full(4)

    def hold(broker: Broker) -> object:
        store = RedisWeightStore(broker, KEYS, WeightsConfig(), SEAL)
        store.publish(4, [new], consumed=0, fence=1)
        return store.head()

    manifest = Manifest.in_chunks(old).signed_for(old, SEAL).pack(SEAL)
    listed = {b"3.full": pack_available(old.available)}
    room = (Ours(listed), Together([[b"3.full"], 2]), listed, _script(b"OK", b"3.full", manifest), _script(b"OK"))
    return Conversation("weights_written", hold, (*room, *itertools.repeat(_script(b"OK"), 3), b"4"))
