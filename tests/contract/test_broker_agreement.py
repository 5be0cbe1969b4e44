"""The fake and Redis answer any sequence of calls alike, and keep their books while they do."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lambdapo_async.broker.interface import Delivery, Descriptor, EnqueueReply, RolloutSource
from lambdapo_async.broker.limits import RunLimits
from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.errors import LambdaPOError
from lambdapo_async.rollout import Lease
from tests.contract.broker_world import durable, start
from tests.fakes_broker import FakeRun
from tests.fakes_redis_run import FakeRedisRun
from tests.redis_fixtures import TIMEOUT_S, BrokerRun, next_run_id
from tests.weight_files import full

LIMITS = RunLimits(max_staleness=1, groups_per_step=2, max_groups=4, max_bytes=300, group_bytes=60, lease_s=60.0)
ACTORS = ("a", "b")
NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)  # each example costs a hundred calls of a real server

actors = st.sampled_from(ACTORS)


@dataclass
class Player:
    """Plays the moves on one kind of run; what it returns is what both kinds must agree on."""

    run: BrokerRun
    open_run: Callable[[], BrokerRun]
    source: RolloutSource
    fence: int = 1
    granted: dict[str, list[Lease]] = field(default_factory=lambda: {actor: [] for actor in ACTORS})

    def play(self, move: Callable[..., object], *arguments: object) -> object:
        try:
            return move(self, *arguments)
        except LambdaPOError as error:
            return type(error)

    def lease(self, actor: str, count: int) -> object:
        granted = self.run.admission(actor).lease(count)
        self.granted[actor].extend(granted)
        return granted

    def hand_back(self, actor: str, count: int) -> None:
        """The oldest leases ever granted to the actor, answered ones included."""
        self.run.admission(actor).hand_back(self.granted[actor][:count])
        self.granted[actor] = self.granted[actor][count:]

    def renew(self, actor: str, other: str) -> object:
        """What is ours, and what is another's."""
        return self.run.admission(actor).renew([*self.granted[actor], *self.granted[other]])

    def answer(self, actor: str, other: str, place: int, size: int) -> object:
        """``actor`` answers a lease that ``other`` got."""
        granted = self.granted[other] or [Lease("train", place)]
        return self.offer(actor, 1, granted[place % len(granted)], size)

    def offer(self, actor: str, ahead: int, lease: Lease, size: int) -> object:
        """``ahead`` 1 is the number that the queue expects."""
        return self.burst(actor, ahead, [(lease, size)])

    def burst(self, actor: str, ahead: int, groups: Sequence[tuple[Lease, int]]) -> object:
        """Several at once."""
        first = self.marks(actor).last + ahead
        deliveries = [
            Delivery(Descriptor(f"{actor}.0", seq, lease, 0, size, 0.0), bytes(size))
            for seq, (lease, size) in enumerate(groups, first)
        ]
        reply = self.run.sink().enqueue(deliveries, epoch=self.run.run_store.state().epoch)
        return (reply.status, reply.last, reply.committed)

    def marks(self, actor: str) -> EnqueueReply:
        """What the queue knows of a producer: the answer to a number that is always a duplicate."""
        probe = Descriptor(f"{actor}.0", 0, Lease("train", 0), 0, 0, 0.0)
        return self.run.sink().enqueue([Delivery(probe, b"")], epoch=self.run.run_store.state().epoch)

    def read(self, count: int) -> object:
        return [delivery.descriptor for delivery in self.source.read(count, timeout_s=0.001)]

    def commit(self, actor: str, mark: int) -> None:
        """A learner commits what it has read; here that is everything."""
        self.source.read(100, timeout_s=0.001)
        self.source.commit({f"{actor}.0": min(mark, self.marks(actor).last)})

    def release(self, consumed: int) -> None:
        self.source.release(consumed)

    def evaluate(self) -> None:
        self.source.request_evaluation([Lease("heldout", index, 1) for index in range(2)])

    def publish(self, version: int, consumed: int) -> object:
        self.run.weights.publish(version, [full(version)], consumed=consumed, fence=self.fence)
        return self.run.weights.files()

    def restart(self, consumed: int, next_index: int) -> None:
        """The learner dies and another one takes over from what was committed."""
        self.fence += 1
        self.run = self.open_run()
        self.source = self.run.source(self.fence, LIMITS)
        marks = {f"{actor}.0": self.marks(actor).committed for actor in ACTORS}
        self.source.initialise(durable(marks, consumed=consumed, next_index=next_index))


train_leases = st.builds(Lease, st.just("train"), st.integers(0, 9))
bursts = st.lists(st.tuples(train_leases, st.sampled_from([1, 1, 1, 100, 301])), min_size=2, max_size=4)
moves = st.one_of(
    st.tuples(st.just(Player.lease), actors, st.integers(0, 5)),
    st.tuples(st.just(Player.lease), actors, st.just(2)),
    st.tuples(st.just(Player.answer), actors, actors, st.integers(0, 9), st.sampled_from([1, 100, 301])),
    st.tuples(st.just(Player.answer), st.just("a"), st.just("a"), st.integers(0, 1), st.just(1)),
    st.tuples(st.just(Player.hand_back), actors, st.integers(1, 3)),
    st.tuples(st.just(Player.renew), actors, actors),
    st.tuples(st.just(Player.offer), actors, st.integers(-1, 2), train_leases, st.just(1)),
    st.tuples(st.just(Player.burst), actors, st.integers(-1, 2), bursts),
    st.tuples(st.just(Player.read), st.integers(1, 3)),
    st.tuples(st.just(Player.commit), actors, st.integers(0, 6)),
    st.tuples(st.just(Player.release), st.integers(0, 12)),
    st.tuples(st.just(Player.evaluate)),
    st.tuples(st.just(Player.publish), st.integers(0, 6), st.integers(0, 12)),
    st.tuples(st.just(Player.restart), st.integers(0, 3), st.integers(0, 3)),
)  # fmt: skip


@settings(max_examples=15, deadline=None, phases=NO_SHRINKING, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(moves, min_size=50, max_size=60))
def test_the_fake_and_redis_agree(redis_url: str, script: list[tuple[Any, ...]]) -> None:
    opened: list[RedisRun] = []
    run_id, shared = next_run_id(), FakeRedisRun()

    def open_redis() -> RedisRun:
        opened.append(RedisRun(redis_url, run_id, timeout_s=TIMEOUT_S))
        return opened[-1]

    def open_fake() -> FakeRun:
        return FakeRun("test", shared)

    try:
        players = []
        for opener in (open_redis, open_fake):
            run = opener()
            players.append(Player(run, opener, start(run, LIMITS)))
        for move in script:
            real, fake = (player.play(*move) for player in players)
            assert real == fake, move
            stats, fake_stats = (player.source.stats() for player in players)
            assert stats == fake_stats, move
            assert stats.queued <= LIMITS.max_groups
            assert stats.num_bytes <= LIMITS.max_bytes
    finally:
        for run in opened:
            run.close()
