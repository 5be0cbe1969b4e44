"""Actors that follow a learner through real weight files: every one of them must end with the learner's bits."""

import asyncio
import contextlib
import resource
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from actors.between_groups import BetweenGroups
from actors.follower import WeightFollower
from actors.scripted_engine import ScriptedEngine, bigram_script
from lambdapo_async.config import RunConfig
from lambdapo_async.config.sections import SamplingConfig
from lambdapo_async.errors import EngineError, WeightsError
from lambdapo_async.weights.catch_up import Available
from lambdapo_async.weights.delta_file import make_delta, write_full
from lambdapo_async.weights.state import State
from lambdapo_async.weights.tensor_file import compress
from lambdapo_async.weights.union import Union

RUN = "follow"
POOL = ThreadPoolExecutor(1)
TIMEOUT_S = 20.0
KEPT_STEPS = 12
UNION_EVERY = 8
SHAPES = {
    "model.embed_tokens.weight": (64, 32),
    "model.layers.0.mlp.up_proj.weight": (96, 32),
    "model.layers.1.mlp.up_proj.weight": (96, 32),
    "model.norm.weight": (32,),
}
NORM = "model.norm.weight"


def config_of(*, max_staleness: int, data_timeout_s: float = 600.0) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": "m"},
            "task": {"kind": "arithmetic"},
            "staleness": {"max_staleness": max_staleness},
            "broker": {"heartbeat_s": 0.01, "lease_s": 1.0},
            "learner": {"data_timeout_s": data_timeout_s},
        }
    )


class Learner:
    """Makes versions and publishes them as a store would: a keyframe, steps that are pruned, unions."""

    def __init__(self, *, seed: int = 0, shapes: dict[str, tuple[int, ...]] = SHAPES) -> None:
        self.rng = torch.Generator().manual_seed(seed)
        self.tensors = {name: torch.randn(shape, generator=self.rng) for name, shape in shapes.items()}
        self.state = self.cast(0)
        self.union = Union(self.state, POOL)
        self.store = MemoryWeights()
        self.store.add(Available(version=0, num_bytes=0), compress(write_full(self.state, run_id=RUN, pool=POOL)))

    def cast(self, version: int) -> State:
        return State.of_torch(version, {name: tensor.bfloat16() for name, tensor in self.tensors.items()})

    def step(self, change: Callable[[dict[str, Tensor]], None] | None = None) -> None:
        """The next version: by default one element in fifty changes."""
        if change is None:
            for tensor in self.tensors.values():
                touched = torch.rand(tensor.shape, generator=self.rng) < 0.02
                tensor += touched * 0.05 * torch.randn(tensor.shape, generator=self.rng)
        else:
            change(self.tensors)
        old, self.state = self.state, self.cast(self.state.version + 1)
        version = self.state.version
        delta = make_delta(old, self.state, run_id=RUN, keyframe_version=0, pool=POOL)
        self.union.record(delta.delta)
        if version % UNION_EVERY == 0:
            self.store.replace_union(version, self.union.file(self.state, run_id=RUN, pool=POOL).to_bytes())
        self.store.add(Available(version=version, num_bytes=0, base_version=version - 1), delta.to_bytes())
        self.store.prune_steps(version - KEPT_STEPS)

    def publish_whole(self) -> None:
        """The next version, as a learner publishes it that finds the store empty."""
        self.state = self.cast(self.state.version + 1)
        self.union = Union(self.state, POOL)
        payload = compress(write_full(self.state, run_id=RUN, pool=POOL))
        self.store.add(Available(version=self.state.version, num_bytes=0), payload)

    @property
    def full_bytes(self) -> int:
        return min(file.num_bytes for file in self.store.payloads if file.base_version is None)


class MemoryWeights:
    """The actor's half of ``WeightStore``, in memory; damages what it is told to."""

    def __init__(self) -> None:
        self.payloads: dict[Available, bytes] = {}
        self.damage: dict[int, Callable[[bytes], bytes]] = {}
        """By version, applied to one fetch each."""
        self.fetched: list[Available] = []
        self.link = threading.Event()
        """Unset, a fetch hangs."""
        self.link.set()
        self.fetching = threading.Event()
        self.looked_for = threading.Semaphore(0)
        """One for each look at the head that found nothing newer."""
        self._head: int | None = None
        self._newer = threading.Condition()

    def add(self, file: Available, payload: bytes) -> None:
        with self._newer:
            sized = Available(
                version=file.version,
                num_bytes=len(payload),
                base_version=file.base_version,
                base_min=file.base_min,
            )
            self.payloads[sized] = payload
            self._head = file.version
            self._newer.notify_all()

    def lose_everything(self, _: bytes = b"") -> bytes:
        """What a Redis without persistence does at a restart; as a damage, in the middle of a fetch."""
        with self._newer:
            self.payloads.clear()
            self._head = None
        raise WeightsError("the file is gone: the head is None")

    def roll_back(self, version: int) -> None:
        """What a Redis with snapshots does at a restart: the versions above are as if they had never been."""
        with self._newer:
            self.payloads = {file: data for file, data in self.payloads.items() if file.version <= version}
            self._head = version

    def replace_union(self, version: int, payload: bytes) -> None:
        with self._newer:
            self.payloads = {file: data for file, data in self.payloads.items() if file.base_min is None}
            self.payloads[Available(version=version, num_bytes=len(payload), base_version=0, base_min=0)] = payload

    def prune_steps(self, below: int) -> None:
        with self._newer:
            self.payloads = {
                file: data
                for file, data in self.payloads.items()
                if file.base_version is None or file.base_min is not None or file.version > below
            }

    def publish(self, version: int, files: object, *, consumed: int, fence: int) -> None:
        raise NotImplementedError

    def head(self) -> int | None:
        return self._head

    def wait_newer(self, than: int, *, timeout_s: float) -> int | None:
        with self._newer:  # short waits, so that a cancelled follower's thread ends soon
            self._newer.wait_for(lambda: self._head is not None and self._head > than, min(timeout_s, 0.02))
            if self._head is not None and self._head > than:
                return self._head
            self.looked_for.release()
            return None

    def files(self) -> tuple[Available, ...]:
        with self._newer:
            return tuple(self.payloads)

    def fetch(self, file: Available) -> bytes:
        self.fetched.append(file)
        self.fetching.set()
        assert self.link.wait(TIMEOUT_S)
        if file not in self.payloads:
            raise WeightsError(f"version {file.version} is gone")
        return self.damage.pop(file.version, bytes)(self.payloads[file])


class HoldingEngine(ScriptedEngine):
    """Copies the tensors that it is told have changed, as an engine does; the rest stays what it was."""

    def __init__(self) -> None:
        super().__init__(bigram_script(16), eos_token_id=0, max_length=4096)
        self.tensors: dict[str, Tensor] = {}
        self.loads: list[Set[str] | None] = []

    async def load_weights(self, version: int, path: Path, *, changed: Set[str] | None = None) -> float:
        pause_s = await super().load_weights(version, path, changed=changed)
        self.loads.append(changed)
        loaded = load_file(path)
        names = loaded.keys() if changed is None else changed
        self.tensors.update({name: loaded[name].clone() for name in names})
        return pause_s + 1e-6

    def checksum(self) -> str:
        return State.of_torch(self.policy_version, self.tensors).checksum(POOL)


class FollowingActor:
    def __init__(
        self, learner: Learner, folder: Path, *, max_staleness: int = 2, data_timeout_s: float = 600.0
    ) -> None:
        self.learner = learner
        self.engine = HoldingEngine()
        folder.mkdir(exist_ok=True)
        self.follower = WeightFollower(
            learner.store,
            self.engine,
            run_id=RUN,
            folder=folder,
            config=config_of(max_staleness=max_staleness, data_timeout_s=data_timeout_s),
        )

    def publish_over_a_dead_link(self) -> None:
        """A new version, of which the fetch begins and hangs."""
        self.learner.store.link.clear()
        self.learner.store.fetching.clear()
        self.follower.changed.clear()
        self.learner.step()

    async def catch_up(self) -> None:
        """Follow until the head is reached."""
        async with self.following() as task:
            async with asyncio.timeout(TIMEOUT_S):
                while self.engine.policy_version != self.learner.state.version:
                    self.follower.changed.clear()
                    adopted = asyncio.ensure_future(self.follower.changed.wait())
                    await asyncio.wait([adopted, task], return_when=asyncio.FIRST_COMPLETED)
                    adopted.cancel()
                    if task.done():
                        await task

    @contextlib.asynccontextmanager
    async def following(self) -> AsyncIterator[asyncio.Task[None]]:
        task = asyncio.create_task(self.follower.follow())
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.wait([task])

    def counter(self, name: str) -> float:
        return self.follower.counters()[name]

    def assert_has_the_learners_bits(self) -> None:
        assert self.engine.policy_version == self.learner.state.version
        expected = self.learner.state.checksum(POOL)
        assert self.engine.checksum() == expected
        assert self.follower.checksum_of(self.learner.state.version) == expected
        assert self.follower.mirror.checksum == expected


@pytest.fixture
def learner() -> Learner:
    return Learner()


@pytest.fixture
def actor(learner: Learner, tmp_path: Path) -> FollowingActor:
    return FollowingActor(learner, tmp_path / "actor")


def flip_one_bit(payload: bytes) -> bytes:
    """In the middle, past the zstd header: the frame's checksum or ours must notice."""
    at = len(payload) // 2
    return payload[:at] + bytes([payload[at] ^ 4]) + payload[at + 1 :]


async def test_forty_versions_reach_every_kind_of_actor_to_the_bit(
    learner: Learner, tmp_path: Path, record_property: Callable[[str, object], None]
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


async def test_the_engine_is_told_what_changed_since_it_last_loaded(learner: Learner, actor: FollowingActor) -> None:
    await actor.catch_up()
    learner.step(lambda tensors: tensors[NORM].add_(1.0))
    learner.step(lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][3].mul_(2.0))
    await actor.catch_up()
    await actor.catch_up()
    learner.step(lambda tensors: None)
    await actor.catch_up()
    assert actor.engine.loads == [None, {NORM, "model.layers.1.mlp.up_proj.weight"}, frozenset()]
    actor.assert_has_the_learners_bits()


async def test_a_tensor_that_is_sent_whole_is_in_the_file_too(learner: Learner, actor: FollowingActor) -> None:
    """More than can be said in gaps: the delta replaces it, and the mirror's file must not keep the old one."""
    await actor.catch_up()
    for _ in range(2):
        learner.step(lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].normal_())
        learner.step()
        await actor.catch_up()
    actor.assert_has_the_learners_bits()
    assert actor.counter("weight_keyframes") == 1


async def test_many_small_updates_leave_one_file(learner: Learner, actor: FollowingActor, tmp_path: Path) -> None:
    for _ in range(3):
        await actor.catch_up()
        learner.step()
    assert [path.name for path in (tmp_path / "actor").iterdir()] == ["mirror.safetensors"]


async def test_sampling_goes_on_while_a_fetch_hangs(learner: Learner, actor: FollowingActor) -> None:
    await actor.catch_up()
    actor.publish_over_a_dead_link()
    async with actor.following():
        assert await asyncio.to_thread(learner.store.fetching.wait, TIMEOUT_S)
        (completion,) = await actor.engine.sample_group([1], size=1, sampling=SamplingConfig(max_tokens=30))
        assert {span.policy_version for span in completion.version_spans} == {0}
        learner.store.link.set()
        async with asyncio.timeout(TIMEOUT_S):
            await actor.follower.changed.wait()
    actor.assert_has_the_learners_bits()
    counters = actor.follower.counters()
    assert min(counters[f"weight_{name}_s"] for name in ("fetch", "decode", "apply", "pause")) > 0


async def test_leases_wait_for_weights_that_are_on_their_way(
    learner: Learner, actor: FollowingActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert actor.follower.is_behind, "without weights nothing can be sampled"
    await actor.catch_up()
    assert not actor.follower.is_behind
    actor.publish_over_a_dead_link()
    async with actor.following():
        assert await asyncio.to_thread(learner.store.fetching.wait, TIMEOUT_S)
        monkeypatch.setattr("actors.follower._HOLD_S", 3600.0)
        assert actor.follower.is_behind
        monkeypatch.setattr("actors.follower._HOLD_S", 0.0)
        assert not actor.follower.is_behind, "a slow link must not starve the engine"
        learner.store.link.set()


async def test_without_staleness_leases_wait_for_as_long_as_it_takes(
    learner: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor = FollowingActor(learner, tmp_path / "strict", max_staleness=0)
    await actor.catch_up()
    monkeypatch.setattr("actors.follower._HOLD_S", 0.0)
    actor.publish_over_a_dead_link()
    async with actor.following():
        assert await asyncio.to_thread(learner.store.fetching.wait, TIMEOUT_S)
        assert actor.follower.is_behind
        learner.store.link.set()


DAMAGES = {
    "bit": flip_one_bit,
    "cut": lambda payload: payload[: len(payload) // 2],
    "nothing": lambda payload: b"",
    "noise": lambda payload: b"not weights" * 10,
}


@pytest.mark.parametrize("damage", list(DAMAGES))
async def test_damage_costs_a_keyframe_and_is_counted(learner: Learner, actor: FollowingActor, damage: str) -> None:
    await actor.catch_up()
    learner.step()
    learner.store.damage[1] = DAMAGES[damage]
    await actor.catch_up()
    actor.assert_has_the_learners_bits()
    assert actor.counter("weight_failures") == 1
    assert [(file.version, file.base_version) for file in learner.store.fetched] == [
        (0, None),
        (1, 0),
        (0, None),
        (1, 0),
    ]


async def test_a_file_that_goes_while_we_fetch_costs_a_keyframe(learner: Learner, actor: FollowingActor) -> None:
    await actor.catch_up()
    learner.step()

    def gone(payload: bytes) -> bytes:
        raise WeightsError("version 1 is gone")

    learner.store.damage[1] = gone
    await actor.catch_up()
    actor.assert_has_the_learners_bits()
    assert actor.counter("weight_failures") == 1


async def test_two_failures_in_a_row_stop_sampling_and_end_the_actor(learner: Learner, actor: FollowingActor) -> None:
    await actor.catch_up()
    learner.step()
    learner.store.damage = {0: flip_one_bit, 1: flip_one_bit}
    with pytest.raises(WeightsError):
        await actor.catch_up()
    assert actor.counter("weights_failed") == 1
    assert actor.counter("weight_failures") == 2
    assert actor.follower.is_behind, "nothing may be leased any more"
    assert actor.engine.policy_version == 0


async def test_weights_that_are_gone_are_waited_for(learner: Learner, actor: FollowingActor) -> None:
    """Twice in a row Redis loses everything in the middle of a fetch: nobody's fault, and the learner comes back."""
    await actor.catch_up()
    learner.step()
    learner.store.damage = {1: learner.store.lose_everything, 2: learner.store.lose_everything}
    async with actor.following() as task:
        for number in (1, 2):
            async with asyncio.timeout(TIMEOUT_S):
                while actor.counter("weight_failures") < number:
                    await asyncio.sleep(0)
            assert not task.done()
            learner.publish_whole()
    await actor.catch_up()
    actor.assert_has_the_learners_bits()
    assert actor.counter("weight_failures") == 2
    assert actor.counter("weights_failed") == 0


async def test_a_head_that_went_back_is_not_followed_and_its_successor_is(
    learner: Learner, actor: FollowingActor
) -> None:
    for _ in range(5):
        learner.step()
    await actor.catch_up()
    learner.store.roll_back(3)
    async with actor.following() as task:
        # It looked at the older head and stayed where it was.
        await asyncio.to_thread(actor.learner.store.looked_for.acquire, timeout=TIMEOUT_S)
        await asyncio.to_thread(actor.learner.store.looked_for.acquire, timeout=TIMEOUT_S)
        assert not task.done()
        assert actor.engine.policy_version == 5
        learner.publish_whole()
        await asyncio.wait_for(until_adopted(actor), TIMEOUT_S)
        actor.assert_has_the_learners_bits()
    learner.step()
    await actor.catch_up()
    actor.assert_has_the_learners_bits()
    assert (actor.counter("weight_failures"), actor.counter("weight_updates")) == (0, 3)


@pytest.mark.parametrize("head", [2, 3, 4])
async def test_a_head_that_goes_back_in_the_middle_of_a_chain_costs_a_keyframe(
    learner: Learner, actor: FollowingActor, head: int
) -> None:
    """The engine has version 2, the mirror is already at 4 when 5 goes; the head may be between the two."""
    for _ in range(2):
        learner.step()
    await actor.catch_up()
    for _ in range(3):
        learner.step()

    def go_back(_: bytes) -> bytes:
        learner.store.roll_back(head)
        raise WeightsError(f"the file is gone: the head is {head}")

    learner.store.damage = {5: go_back}
    async with actor.following() as task:
        async with asyncio.timeout(TIMEOUT_S):
            while actor.counter("weight_failures") < 1 or actor.engine.policy_version != head:
                await asyncio.sleep(0)
        assert not task.done()
        learner.publish_whole()
    await actor.catch_up()
    actor.assert_has_the_learners_bits()
    learner.step()
    await actor.catch_up()
    actor.assert_has_the_learners_bits()
    assert actor.counter("weight_failures") == 1


async def test_a_mirror_newer_than_the_head_is_given_up(learner: Learner, actor: FollowingActor) -> None:
    """The engine was cut off while it loaded, and the head went back meanwhile."""
    for _ in range(5):
        learner.step()
    actor.follower._catch_up(5)
    learner.store.roll_back(4)
    async with actor.following() as task:
        await asyncio.wait_for(until_adopted(actor), TIMEOUT_S)
        assert not task.done()
        assert actor.engine.policy_version == 4
        learner.publish_whole()
    await actor.catch_up()
    actor.assert_has_the_learners_bits()
    assert actor.counter("weight_failures") == 1


async def until_adopted(actor: FollowingActor) -> None:
    """The next version is adopted."""
    actor.follower.changed.clear()
    await actor.follower.changed.wait()


async def test_weights_that_are_gone_are_not_waited_for_without_end(learner: Learner, tmp_path: Path) -> None:
    actor = FollowingActor(learner, tmp_path / "actor", data_timeout_s=0.05)
    await actor.catch_up()
    learner.step()
    learner.store.damage = {1: learner.store.lose_everything}
    with pytest.raises(WeightsError, match=r"did not come back within learner\.data_timeout_s = 0\.05"):
        await actor.catch_up()
    assert actor.counter("weights_failed") == 1
    assert actor.follower.is_behind, "nothing may be leased any more"


async def test_two_failures_apart_do_not(learner: Learner, actor: FollowingActor) -> None:
    await actor.catch_up()
    for version in (1, 2):
        learner.step()
        learner.store.damage[version] = flip_one_bit
        await actor.catch_up()
    assert actor.counter("weight_failures") == 2
    assert actor.counter("weights_failed") == 0
    actor.assert_has_the_learners_bits()


async def test_weights_that_are_not_finite_never_reach_the_engine(learner: Learner, actor: FollowingActor) -> None:
    await actor.catch_up()
    before = actor.engine.checksum()
    learner.step(lambda tensors: tensors[NORM].fill_(torch.nan))
    with pytest.raises(WeightsError, match="not finite"):
        await actor.catch_up()
    assert actor.engine.checksum() == before


async def test_another_learners_weights_are_refused(learner: Learner, tmp_path: Path) -> None:
    actor = FollowingActor(learner, tmp_path / "actor")
    await actor.catch_up()
    other = Learner(seed=1)
    for each in (learner, other):
        each.step()
    mine, theirs = (next(f for f in each.store.payloads if f.version == 1) for each in (learner, other))
    with pytest.raises(WeightsError, match="was changed"):  # the same numbers, another base
        actor.follower.mirror.advance(mine, other.store.payloads[theirs])
    assert actor.follower.mirror.version is None


async def test_a_model_of_other_shapes_is_refused_by_the_engine(learner: Learner, tmp_path: Path) -> None:
    actor = FollowingActor(learner, tmp_path / "actor")
    await actor.catch_up()
    before = actor.engine.checksum()
    other = Learner(shapes={**SHAPES, NORM: (64,)})
    actor.follower._store = actor.learner.store = other.store  # the run's Redis was filled by another learner
    other.step()
    actor.learner.state = other.state
    actor.follower.mirror.drop()
    with pytest.raises(WeightsError, match=f"{NORM} is BF16 .64., expected BF16 .32."):
        await actor.catch_up()
    assert actor.engine.checksum() == before


def test_a_delta_is_applied_once(learner: Learner, actor: FollowingActor) -> None:
    mirror, store = actor.follower.mirror, learner.store
    learner.step()
    full, step = sorted(store.payloads, key=lambda file: file.version)
    mirror.advance(full, store.payloads[full])
    mirror.advance(step, store.payloads[step])
    assert mirror.checksum == learner.state.checksum(POOL)
    with pytest.raises(WeightsError, match="changes 0, the state is 1"):
        mirror.advance(step, store.payloads[step])
    assert mirror.version is None, "what failed must not be built upon"
    with pytest.raises(WeightsError, match="holds nothing"):
        mirror.advance(step, store.payloads[step])


def test_tensors_that_come_and_go_are_followed(actor: FollowingActor, learner: Learner) -> None:
    mirror = actor.follower.mirror
    states = [
        State.of_torch(0, {"a": torch.zeros(3), "b": torch.ones(2, 2).half()}),
        State.of_torch(1, {"a": torch.zeros(3), "c": torch.ones(5).bfloat16(), "empty": torch.zeros(0)}),
        State.of_torch(2, {"a": torch.ones(4), "c": torch.ones(5).bfloat16()}),
    ]
    mirror.advance(Available(version=0, num_bytes=0), write_full(states[0], run_id=RUN, pool=POOL))
    for old, new in pairwise(states):
        payload = make_delta(old, new, run_id=RUN, keyframe_version=0, pool=POOL).to_bytes()
        mirror.advance(Available(version=new.version, num_bytes=0, base_version=old.version), payload)
        found = State.of_torch(new.version, load_file(mirror.path))
        assert found.checksum(POOL) == mirror.checksum == new.checksum(POOL)


def test_a_mirror_without_room_says_what_to_do(actor: FollowingActor, learner: Learner) -> None:
    """Not by the SIGBUS that a write to a mapped file without room ends in."""
    mirror = actor.follower.mirror
    (full,) = learner.store.payloads
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))
    try:
        with pytest.raises(WeightsError, match=r"no room for the \d+ bytes .* actor.mirror = 'disk'"):
            mirror.advance(full, learner.store.payloads[full])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert mirror.version is None


async def test_a_failed_swap_ends_the_follower(learner: Learner, actor: FollowingActor) -> None:
    await actor.catch_up()
    actor.engine.die("its process was killed")
    learner.step()
    with pytest.raises(EngineError, match="killed"):
        await actor.catch_up()


async def versions_of_long_groups(engine: BetweenGroups, count: int) -> Sequence[set[int]]:
    groups = await asyncio.gather(
        *(engine.sample_group([i], size=2, sampling=SamplingConfig(max_tokens=50)) for i in range(count))
    )
    return [{span.policy_version for one in group for span in one.version_spans} for group in groups]


async def test_between_groups_no_group_has_two_versions(learner: Learner, actor: FollowingActor) -> None:
    await actor.catch_up()
    learner.step()
    quiet = BetweenGroups(actor.engine)
    path = actor.follower.mirror.path
    early = asyncio.create_task(versions_of_long_groups(quiet, 3))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    update = asyncio.create_task(quiet.load_weights(1, path))
    await asyncio.sleep(0)
    late = asyncio.create_task(versions_of_long_groups(quiet, 3))
    async with asyncio.timeout(TIMEOUT_S):
        assert await early == [{0}] * 3
        assert await late == [{1}] * 3
        assert await update >= 0


async def test_between_groups_a_cancelled_update_lets_the_groups_go_on(actor: FollowingActor) -> None:
    await actor.catch_up()
    quiet = BetweenGroups(actor.engine)
    early = asyncio.create_task(versions_of_long_groups(quiet, 1))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    update = asyncio.create_task(quiet.load_weights(1, actor.follower.mirror.path))
    await asyncio.sleep(0)
    update.cancel()
    async with asyncio.timeout(TIMEOUT_S):
        assert await early == [{0}]
        assert await versions_of_long_groups(quiet, 1) == [{0}]


def test_time_is_not_counted_twice(actor: FollowingActor, learner: Learner) -> None:
    mirror = actor.follower.mirror
    started = time.monotonic()
    (full,) = learner.store.payloads
    mirror.advance(full, learner.store.payloads[full])
    assert 0 < mirror.decode_s + mirror.apply_s <= time.monotonic() - started
