"""What may happen to a run's Redis, by name."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One kind of trouble; actors and learner are killed in all of them."""

    name: str
    persistence: str = "everysec"
    """Key of ``redis_control.PERSISTENCE``."""
    redis_faults: tuple[str, ...] = ()
    """Keys of ``faults.FAULTS``."""
    proxy: bool = False
    hides_run_id: bool = False


PROFILES = {
    profile.name: profile
    for profile in (
        Profile(name="stable"),
        Profile(name="everysec", redis_faults=("redis_restart",)),
        Profile(name="always", persistence="always", redis_faults=("redis_restart",)),
        Profile(name="power_loss", redis_faults=("redis_power_loss",)),
        Profile(name="rdb", persistence="rdb", redis_faults=("redis_snapshot", "redis_restart")),
        Profile(name="empty", redis_faults=("redis_empty",)),
        Profile(name="frozen", redis_faults=("redis_freeze", "redis_freeze_long")),
        Profile(name="cut", proxy=True, redis_faults=("cut_connections", "lose_replies")),
        Profile(
            name="hidden",
            persistence="rdb",
            proxy=True,
            hides_run_id=True,
            redis_faults=("redis_snapshot", "redis_restart"),
        ),
        Profile(name="promotion", proxy=True, redis_faults=("promote_replica",)),
        Profile(name="slow", proxy=True, redis_faults=("slow_link",)),
        Profile(name="full", redis_faults=("redis_full",)),
        Profile(name="evicted", redis_faults=("redis_evicts",)),
    )
}
