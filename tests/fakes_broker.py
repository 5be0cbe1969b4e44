"""The broker in memory: the same seams on one shared state, held to the same contract tests as Redis.

``FakeRun(run_id, state)`` is one process; processes of one run share the ``FakeRedisRun``.
"""

import uuid

from lambdapo_async.broker.limits import RunLimits
from lambdapo_async.config.weights import WeightsConfig
from lambdapo_async.seal import Seal
from tests.fakes_admission import FakeAdmission, FakePartials
from tests.fakes_fleet import FakeFleet, FakeFleetControl
from tests.fakes_redis_run import FakeRedisRun
from tests.fakes_run_store import FakeRunStore
from tests.fakes_sink import FakeRolloutSink
from tests.fakes_source import FakeRolloutSource
from tests.fakes_weight_store import FakeWeightStore


class FakeRun:
    """Same shape as ``RedisRun``: one process of a run in memory."""

    def __init__(self, run_id: str = "fake", state: FakeRedisRun | None = None) -> None:
        self.shared = state or FakeRedisRun()
        self.seal = Seal(None, run_id=run_id)
        self._owner = uuid.uuid4().hex
        self.run_store = FakeRunStore(self.shared, self._owner, run_id)
        self.fleet = FakeFleet(self.shared)
        self.weights = FakeWeightStore(self.shared)
        self.canary = self.shared.canary

    def admission(self, actor_id: str) -> FakeAdmission:
        return FakeAdmission(self.shared, actor_id)

    def partials(self, actor_id: str) -> FakePartials:
        return FakePartials(self.shared, actor_id)

    def sink(self) -> FakeRolloutSink:
        return FakeRolloutSink(self.shared)

    def weights_for(self, config: WeightsConfig) -> FakeWeightStore:
        return FakeWeightStore(self.shared, config)

    def fleet_control(self, fence: int) -> FakeFleetControl:
        return FakeFleetControl(self.shared, fence)

    def source(self, fence: int, limits: RunLimits) -> FakeRolloutSource:
        return FakeRolloutSource(self.shared, self._owner, fence, limits)

    def close(self) -> None:
        """Nothing is open."""
