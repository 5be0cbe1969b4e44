"""Everything that may go wrong, by name: each is a function of the scene and a source of randomness."""

import random
import signal
from collections.abc import Callable

from lambdapo_async.broker.rollout_sink import ANSWERED_KEPT
from tests.chaos.fault_points import ACTOR_POINTS, LEARNER_POINTS, arm, choose_point
from tests.chaos.redis_control import RedisControl
from tests.chaos.scene import Scene
from tests.chaos.spec import LEASE_S, TIMEOUT_S
from tests.chaos.zygote import Forked

Fault = Callable[[Scene, random.Random], str]
"""Does it; returns what exactly was done, for the ledger."""

_OFFER = b"\r\n%d\r\n" % ANSWERED_KEPT
"""In what runs the script of an offer, behind the payloads, and in no other request."""


def kill_actor(scene: Scene, source: random.Random) -> str:
    actor = source.choice(scene.actors)
    actor.kill()
    return actor.who


def kill_learner(scene: Scene, source: random.Random) -> str:
    learner = _learner(scene)
    learner.kill()
    return learner.who


def actor_point(scene: Scene, source: random.Random) -> str:
    actor = source.choice(scene.actors)
    point, count = choose_point(source, ACTOR_POINTS)
    arm(scene.folder, actor.who, point, count)
    return f"{actor.who} {point} {count}"


def learner_point(scene: Scene, source: random.Random) -> str:
    """Now and then in the next life, so that the points of a start have their turn."""
    learner = _learner(scene)
    point, count = choose_point(source, LEARNER_POINTS)
    who = learner.who
    if source.random() < 0.5:
        name, _, number = who.partition("-")
        who = f"{name}-{int(number) + 1}"
    arm(scene.folder, who, point, count)
    if who != learner.who:
        learner.kill()
    return f"{who} {point} {count}"


def end_actor(scene: Scene, source: random.Random) -> str:
    actor = source.choice(scene.actors)
    scene.expect_end(actor)
    actor.send(signal.SIGTERM)
    return actor.who


def end_learner(scene: Scene, source: random.Random) -> str:
    learner = _learner(scene)
    scene.expect_end(learner)
    learner.send(signal.SIGTERM)
    return learner.who


def pause_actor(scene: Scene, source: random.Random) -> str:
    """Longer than its leases, most of the time."""
    actor = source.choice(scene.actors)
    actor.send(signal.SIGSTOP)
    pause_s = source.uniform(0.2, 1.6) * LEASE_S
    scene.later(pause_s, lambda: actor.send(signal.SIGCONT))
    return f"{actor.who} {pause_s:.2f} s"


def replace_sleeping_learner(scene: Scene, source: random.Random) -> str:
    """A learner that sleeps is replaced, and wakes up in the middle of what its successor does."""
    learner = _learner(scene)
    learner.send(signal.SIGSTOP)
    scene.expect_end(learner)
    scene.sleepers.append(learner)
    scene.start_learner()
    sleep_s = source.uniform(0.05, 2.0)
    scene.later(sleep_s, lambda: learner.send(signal.SIGCONT))
    return f"{learner.who} {sleep_s:.2f} s"


def replace_running_learner(scene: Scene, source: random.Random) -> str:
    """Two learners at once: somebody started a second one."""
    learner = _learner(scene)
    scene.expect_end(learner)
    scene.sleepers.append(learner)
    scene.start_learner()
    return learner.who


def learner_dies_before_the_journal(scene: Scene, source: random.Random) -> str:
    """Between reading and writing down."""
    learner = _learner(scene)
    arm(scene.folder, learner.who, "enter:before", source.randrange(1, 6))
    scene.wait_for_end(learner)
    return learner.who


def redis_restart(scene: Scene, source: random.Random) -> str:
    return _restart_redis(scene, source, lambda: "")


def redis_power_loss(scene: Scene, source: random.Random) -> str:
    most = source.choice((64, 4096, 65536, 1 << 30))
    return _restart_redis(scene, source, lambda: f"cut {scene.redis.cut_log(source, most_bytes=most)} bytes")


def redis_empty(scene: Scene, source: random.Random) -> str:
    return _restart_redis(scene, source, scene.redis.empty)


def redis_snapshot(scene: Scene, source: random.Random) -> str:
    scene.redis.save_snapshot()
    return ""


def redis_freeze(scene: Scene, source: random.Random) -> str:
    return _freeze(scene, source.uniform(0.05, 0.9) * TIMEOUT_S)


def redis_freeze_long(scene: Scene, source: random.Random) -> str:
    return _freeze(scene, source.uniform(1.1, 1.6) * TIMEOUT_S)


def redis_full(scene: Scene, source: random.Random) -> str:
    """Somebody else fills it: nothing that needs memory is written, or a little is and then nothing more."""
    beyond = source.choice((-200_000, source.randrange(0, 40_000)))
    full_s = source.uniform(0.2, 1.5) * TIMEOUT_S
    scene.redis.limit_memory(beyond)
    scene.later(full_s, scene.redis.lift_limit)
    return f"{beyond} bytes beyond what it holds, for {full_s:.2f} s"


def redis_evicts(scene: Scene, source: random.Random) -> str:
    """Its policy is another than ``noeviction``: some keys go."""
    return ", ".join(scene.redis.evict(source) for _ in range(source.randrange(1, 4)))


def promote_replica(scene: Scene, source: random.Random) -> str:
    """The primary dies with what it had not sent yet; now and then the replica is far behind."""
    assert scene.proxy is not None
    replica = RedisControl(scene.folder / f"r{source.randrange(10**6)}", scene.profile.persistence)
    replica.start()
    replica.follow(scene.redis)
    lag_s = source.choice((0.0, source.uniform(0.0, 1.0)))
    if lag_s:
        replica.freeze()
        scene.tend(lag_s)
    primary, scene.redis = scene.redis, replica
    primary.kill()
    scene.redis_is_up = False
    if lag_s:
        replica.thaw()
    replica.promote()
    scene.proxy.target = replica.socket
    scene.redis_is_up = True
    return f"{lag_s:.2f} s behind"


def cut_connections(scene: Scene, source: random.Random) -> str:
    assert scene.proxy is not None
    scene.proxy.cut()
    return ""


def lose_replies(scene: Scene, source: random.Random) -> str:
    assert scene.proxy is not None
    count = source.randrange(1, 6)
    scene.proxy.lose_replies(count)
    return str(count)


def slow_link(scene: Scene, source: random.Random) -> str:
    """Somewhat slower than it was, up to slower than a reply may be."""
    assert scene.proxy is not None
    throttle = scene.proxy.throttle
    bytes_per_s, delay_s = source.choice((20_000, 100_000, 500_000)), source.uniform(0.0, 0.1)
    slow_s = source.uniform(0.2, 1.5) * TIMEOUT_S
    throttle.slow_down(bytes_per_s, delay_s=delay_s)
    scene.later(slow_s, throttle.full_speed)
    return f"{bytes_per_s} B/s, {delay_s:.3f} s late, for {slow_s:.2f} s"


def lose_a_suspended_run(scene: Scene, source: random.Random) -> str:
    """Its learner is gone, and the next one has not looked yet."""
    learner = _learner(scene)
    end_learner(scene, source)
    scene.wait_for_end(learner)
    return f"{learner.who}, {lose(scene, source)}"


def lose_offer_reply(scene: Scene, source: random.Random) -> str:
    """The next group that is offered arrives, and its actor does not know."""
    assert scene.proxy is not None
    scene.proxy.lose_replies(1, to=_OFFER)
    return "offer"


def suspend_and_lose(scene: Scene, source: random.Random) -> str:
    """Redis goes while the learner writes its last checkpoint, or before its successor has read anything."""
    who = end_learner(scene, source)
    scene.tend(source.uniform(0.0, 0.3))
    return f"{who}, {lose(scene, source)}"


def resume_and_lose(scene: Scene, source: random.Random) -> str:
    """Redis goes while the successor of a dead learner starts, or takes journaled steps again."""
    who = kill_learner(scene, source)
    scene.tend(source.uniform(0.0, 1.0))
    return f"{who}, {lose(scene, source)}"


def lose_twice(scene: Scene, source: random.Random) -> str:
    """The second time while the first loss is being repaired."""
    first = lose(scene, source)
    scene.tend(source.uniform(0.0, 0.5))
    return f"{first}, {lose(scene, source)}"


def lose(scene: Scene, source: random.Random) -> str:
    """What the profile has against Redis; it has something."""
    name = source.choice([each for each in scene.profile.redis_faults if each != redis_snapshot.__name__])
    return f"{name} {REDIS_FAULTS[name](scene, source)}"


def _learner(scene: Scene) -> Forked:
    assert scene.learner is not None
    return scene.learner


def _restart_redis(scene: Scene, source: random.Random, meanwhile: Callable[[], object]) -> str:
    scene.redis_is_up = False
    scene.redis.kill()
    what = meanwhile()
    down_s = source.choice((0.0, source.uniform(0.0, 0.8)))
    if down_s:
        scene.tend(down_s)
    scene.start_redis()
    return f"down {down_s:.2f} s {what or ''}"


def _freeze(scene: Scene, duration_s: float) -> str:
    scene.redis_is_up = False
    scene.redis.freeze()
    scene.tend(duration_s)
    scene.redis.thaw()
    scene.redis_is_up = True
    return f"{duration_s:.2f} s"


PROCESS_FAULTS: dict[str, Fault] = {
    each.__name__: each
    for each in (
        kill_actor, kill_learner, actor_point, learner_point, end_actor, end_learner, pause_actor,
        replace_sleeping_learner, replace_running_learner,
    )
}  # fmt: skip
REDIS_FAULTS: dict[str, Fault] = {
    each.__name__: each
    for each in (
        promote_replica, redis_restart, redis_power_loss, redis_empty, redis_snapshot, redis_freeze, redis_freeze_long,
        redis_full, redis_evicts, cut_connections, lose_replies, slow_link,
    )
}  # fmt: skip
COMBINED_FAULTS: dict[str, Fault] = {each.__name__: each for each in (suspend_and_lose, resume_and_lose, lose_twice)}
"""For profiles that have a fault for Redis."""
DIRECTED_FAULTS: dict[str, Fault] = {
    "learner_dies_before_the_journal": learner_dies_before_the_journal,
    "lose_offer_reply": lose_offer_reply,
    "lose_a_suspended_run": lose_a_suspended_run,
}
"""For mutants alone."""
FAULTS = {**PROCESS_FAULTS, **REDIS_FAULTS, **COMBINED_FAULTS, **DIRECTED_FAULTS}
POINT_FAULTS = frozenset({"actor_point", "learner_point"})
"""They only lay a trap."""
