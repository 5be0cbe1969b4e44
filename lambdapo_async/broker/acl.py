"""Who may do what in Redis: one user for the learner, one for the actors.

An actor cannot write weights, the config or rows; the learner cannot forge heartbeats. Redis 6.2 knows no keys that
may only be read: there, both users are kept to the keys of the runs, and ``broker.hmac_key`` guards the weights.
"""

from collections.abc import Sequence
from typing import Literal, get_args

from lambdapo_async.keys import RunKeys
from lambdapo_async.rollout import SPLITS

Role = Literal["learner", "actor"]
ROLES: tuple[Role, ...] = get_args(Role)
FIRST_WITH_READ_ONLY_KEYS = 7
_COMMANDS = ("+@all", "-@admin", "-@dangerous", "+info")


def rules(role: Role, run_id: str, *, redis_major: int) -> list[str]:
    """Arguments of ``ACL SETUSER`` after the user's name, without a password.

    Args:
        role: whose.
        run_id: of the run, or ``*`` for all runs of this server.
        redis_major: the server's version.
    """
    keys = RunKeys(run_id)
    everything = keys.everything.decode()
    if redis_major < FIRST_WITH_READ_ONLY_KEYS:
        patterns = [f"~{everything}"]
    else:
        patterns = [f"%R~{everything}", *(f"%RW~{name.decode()}" for name in _written_by(role, keys))]
    return ["on", "resetkeys", "resetchannels", *patterns, *_COMMANDS]


def _written_by(role: Role, keys: RunKeys) -> Sequence[bytes]:
    both = (
        keys.state, keys.queue, keys.all_payloads, keys.accepted, keys.committed, keys.leases, keys.holders,
        keys.todo, keys.heldout, keys.answered,
    )  # fmt: skip
    if role == "learner":
        return (
            *both,
            keys.config,
            keys.model_files,
            *map(keys.rows, SPLITS),
            keys.dead,
            keys.quarantined,
            keys.all_weights,
        )
    return (
        *both, keys.grant("*"), keys.fleet, keys.fleet_expiry, keys.partials, keys.all_partials,
        keys.weights_readers, keys.weights_canary_wish,
    )  # fmt: skip
