"""Unfinished groups between two actors, in memory and in Redis."""

from lambdapo_async.broker.partials import SHARE_OF_QUEUE, RedisPartials
from lambdapo_async.broker.redis_run import RedisRun
from tests.contract.broker_world import LIMITS, start, train, until
from tests.redis_fixtures import BrokerRun, OpenRun

(FIRST,) = train(0)
LARGEST = LIMITS.max_bytes // SHARE_OF_QUEUE


def test_the_next_holder_finds_what_the_last_one_left(open_run: OpenRun[BrokerRun]) -> None:
    run, other = open_run(), open_run()
    start(run)
    leaver, taker = run.partials("a"), other.partials("b")
    assert run.admission("a").lease(1) == (FIRST,)
    assert leaver.leave(FIRST, b"half")
    run.admission("a").hand_back([FIRST])
    assert taker.take(FIRST) is None, "before it holds the lease"
    assert other.admission("b").lease(1) == (FIRST,)
    assert taker.take(FIRST) == b"half"
    assert taker.take(FIRST) == b"half", "a taker that dies leaves it to the next one"
    taker.forget(FIRST)
    assert taker.take(FIRST) is None


def test_only_the_holder_leaves_anything(broker_run: BrokerRun) -> None:
    start(broker_run)
    broker_run.admission("a").lease(1)
    assert not broker_run.partials("b").leave(FIRST, b"x")
    assert not broker_run.partials("a").leave(train(1)[0], b"x")
    assert broker_run.partials("a").take(FIRST) is None


def test_all_of_them_share_a_budget(broker_run: BrokerRun) -> None:
    start(broker_run)
    leases = broker_run.admission("a").lease(3)
    partials = broker_run.partials("a")
    assert not partials.leave(leases[0], b"x" * (LARGEST + 1))
    assert partials.leave(leases[0], b"x" * (LARGEST - 5))
    assert partials.leave(leases[0], b"y" * (LARGEST - 5)), "it replaces its own"
    assert not partials.leave(leases[1], b"x" * 6)
    assert partials.leave(leases[2], b"x" * 5)
    partials.forget(leases[0])
    assert partials.leave(leases[1], b"x" * 6)
    assert partials.take(leases[0]) is None


def test_what_expired_frees_its_budget_and_what_vanished_is_told_apart(redis_run: RedisRun, redis_url: str) -> None:
    start(redis_run)
    first, second, third = redis_run.admission("a").lease(3)
    broker = redis_run._broker
    hasty = RedisPartials(broker, redis_run.keys, "a", kept_s=0.02)
    assert hasty.leave(first, b"x" * LARGEST)
    until(lambda: hasty.take(first) is None)
    assert hasty.leave(second, b"x" * LARGEST)
    patient = redis_run.partials("a")
    until(lambda: patient.leave(third, b"x" * LARGEST))
    assert broker.call(lambda client: client.hkeys(redis_run.keys.partials)) == [third.id.encode()]
    broker.call(lambda client: client.delete(redis_run.keys.partial(third)))
    assert patient.take(third) == b""
