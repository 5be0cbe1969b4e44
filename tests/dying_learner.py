"""``python -m tests.dying_learner PLACE CALL <arguments of learner>``: a learner that kills itself with SIGKILL."""

import os
import signal
import sys
from collections.abc import Mapping

from lambdapo_async.broker.rollout_source import RedisRolloutSource
from lambdapo_async.cli.errors import run_main
from learner.__main__ import app
from learner.checkpoint import CheckpointStore
from learner.policy import Policy
from learner.stepper import Stepper
from learner.versions import VersionCounter

PLACES: Mapping[str, tuple[type, str, bool]] = {
    "journaled, not committed": (RedisRolloutSource, "commit", True),
    "step written, not trained": (Stepper, "train", True),
    "trained, no version claimed": (Stepper, "train", False),
    "version claimed, not published": (VersionCounter, "claim", False),
    "published, not in a checkpoint": (RedisRolloutSource, "stats", True),
    "checkpoint half written": (Policy, "save_model", False),
    "checkpoint written, journal not pruned": (CheckpointStore, "prune", True),
}
"""Name -> class, method, and whether the process dies before the method does its work."""


def die_at(place: str, call: int) -> None:
    """Put the death in."""
    owner, name, before = PLACES[place]
    method, left = getattr(owner, name), [call]

    def dying(*args: object, **kwargs: object) -> object:
        left[0] -= 1
        if left[0] == 0 and not before:
            method(*args, **kwargs)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*args, **kwargs)

    setattr(owner, name, dying)


if __name__ == "__main__":
    die_at(sys.argv[1], int(sys.argv[2]))
    run_main(app, sys.argv[3:])
