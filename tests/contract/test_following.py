"""Actors follow what a learner's publisher writes into a store, in memory and in a real Redis, to the last bit."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import Tensor

from lambdapo_async.broker.interface import WeightStore
from lambdapo_async.config.weights import WeightsConfig
from lambdapo_async.weights.catch_up import Available
from lambdapo_async.weights.tensor_file import Payload
from learner.publisher import Publisher
from tests.contract.broker_world import start
from tests.following_actor import RUN, FollowingActor, Trainee, flip_one_bit
from tests.impatient_weights import ImpatientWeights
from tests.redis_fixtures import BrokerRun, OpenRun

NOTHING_STAYS = WeightsConfig(union_every=8, keyframe_share=1.0, grace_s=0.0)
"""One keyframe, unions and the steps since: who misses a step does not find it any more."""


class DamagingWeights(ImpatientWeights):
    """What the link to the store does to a file after the store has vouched for it."""

    def __init__(self, store: WeightStore) -> None:
        super().__init__(store)
        self.damage: dict[int, Callable[[bytes], bytes]] = {}
        """By version, applied to one fetch each."""
        self.fetch = self._fetch

    def _fetch(self, file: Available) -> Payload:
        return self.damage.pop(file.version, bytes)(bytes(self._store.fetch(file)))


class PublishingLearner(Trainee):
    """Publishes every version as a learner does; ``store`` is what its actors read from."""

    def __init__(self, publisher: Publisher, store: WeightStore) -> None:
        super().__init__()
        self._publisher, self.store = publisher, DamagingWeights(store)
        self._publish()

    def published(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.tensors.items():
            yield name, tensor.bfloat16()

    def step(self) -> None:
        """The next version."""
        self.train()
        self.state = self.cast(self.state.version + 1)
        self._publish()

    def _publish(self) -> None:
        self._publisher.publish(self.state.version, self, consumed=0)
        self._publisher.flush()

    @property
    def full_bytes(self) -> int:
        (keyframe,) = (file for file in self.store.files() if file.base_version is None)
        return keyframe.num_bytes


@pytest.fixture
def learner(open_run: OpenRun[BrokerRun]) -> Iterator[PublishingLearner]:
    run, reader = open_run(), open_run()
    start(run)
    with Publisher(run.weights_for(NOTHING_STAYS), run_id=RUN, fence=1, config=NOTHING_STAYS) as publisher:
        yield PublishingLearner(publisher, reader.weights)


async def test_forty_versions_reach_every_kind_of_actor_to_the_bit(
    learner: PublishingLearner, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    names = ("follower", "skipper", "sleeper", "struck", "late")
    actors = {name: FollowingActor(learner, tmp_path / name) for name in names}
    awake = {name: actor for name, actor in actors.items() if name != "late"}
    for actor in awake.values():
        await actor.catch_up()
    for version in range(1, 41):
        learner.step()
        await actors["follower"].catch_up()
        if version % 3 == 0:
            await actors["skipper"].catch_up()
        if version == 20:
            learner.store.damage[20] = flip_one_bit
        await actors["struck"].catch_up()
    for actor in actors.values():
        await actor.catch_up()
        actor.assert_has_the_learners_bits()
    full = learner.full_bytes
    pulled = {name: int(actor.counter("weight_bytes")) for name, actor in actors.items()}
    for name, num_bytes in pulled.items():
        record_property(f"bytes pulled by the {name}, a full version being {full}", num_bytes)
        print(f"{name:8} pulled {num_bytes:7,} bytes, {num_bytes / full:.2f} full versions")  # noqa: T201 - to be looked at
    assert actors["follower"].counter("weight_updates") == 41
    assert actors["follower"].counter("weight_keyframes") == 1
    assert pulled["follower"] < 0.2 * 41 * full
    assert actors["skipper"].counter("weight_keyframes") == 1
    assert actors["sleeper"].counter("weight_chain") == 1  # the union: its steps are long gone
    assert actors["sleeper"].counter("weight_keyframes") == 1
    assert pulled["sleeper"] < 2 * full
    assert actors["late"].counter("weight_chain") == 2  # keyframe and union
    assert actors["struck"].counter("weight_failures") == 1
    assert actors["struck"].counter("weight_keyframes") == 2
