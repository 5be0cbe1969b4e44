"""One process that plays both roles of a run, each as its own Redis user."""

import re
import subprocess
from typing import Any

from lambdapo_async.broker.connection import redis_executable
from lambdapo_async.broker.limits import RunLimits
from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.config.weights import WeightsConfig

_LEARNERS = {"create", "put_rows", "set_phase", "publish", "members", "put_canary", "is_canary_asked"}
"""Calls that the learner makes; all others of the seams below are an actor's."""


def server_major() -> int:
    """Major version of the server that tests start."""
    output = subprocess.run([redis_executable(), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"\bv=(\d+)\.", output)
    assert found is not None
    return int(found[1])


class ByRole:
    """A seam whose calls go to the user that makes them."""

    def __init__(self, learner: object, actor: object) -> None:
        self._learner, self._actor = learner, actor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._learner if name in _LEARNERS else self._actor, name)


class RoleRun:
    """Same shape as ``RedisRun``."""

    def __init__(self, learner: RedisRun, actor: RedisRun) -> None:
        self.learner, self.actor = learner, actor
        self.keys, self._broker = learner.keys, learner._broker
        self.run_store = ByRole(learner.run_store, actor.run_store)
        self.fleet = ByRole(learner.fleet, actor.fleet)
        self.weights = ByRole(learner.weights, actor.weights)
        self.canary = ByRole(learner.canary, actor.canary)

    def admission(self, actor_id: str) -> object:
        return self.actor.admission(actor_id)

    def partials(self, actor_id: str) -> object:
        return self.actor.partials(actor_id)

    def fleet_control(self, fence: int) -> object:
        return self.learner.fleet_control(fence)

    def sink(self) -> object:
        return self.actor.sink()

    def weights_for(self, config: WeightsConfig) -> object:
        return self.learner.weights_for(config)

    def source(self, fence: int, limits: RunLimits) -> object:
        return self.learner.source(fence, limits)

    def close(self) -> None:
        self.learner.close()
        self.actor.close()
