"""Tensors in training, a learner that publishes them into a store whose link can fail, and an actor that follows."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from actors.follower import WeightFollower
from actors.scripted_engine import ScriptedEngine, bigram_script
from lambdapo_async.broker.interface import WeightStore
from lambdapo_async.config import RunConfig
from lambdapo_async.errors import WeightsGoneError
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


class Trainee:
    """Tensors that are trained, and the newest state of them that was published."""

    def __init__(self, *, seed: int = 0, shapes: dict[str, tuple[int, ...]] = SHAPES) -> None:
        self.rng = torch.Generator().manual_seed(seed)
        self.tensors = {name: torch.randn(shape, generator=self.rng) for name, shape in shapes.items()}
        self.state = self.cast(0)

    def cast(self, version: int) -> State:
        return State.of_torch(version, {name: tensor.bfloat16() for name, tensor in self.tensors.items()})

    def train(self) -> None:
        """One element in fifty changes."""
        for tensor in self.tensors.values():
            touched = torch.rand(tensor.shape, generator=self.rng) < 0.02
            tensor += touched * 0.05 * torch.randn(tensor.shape, generator=self.rng)


class Learner(Trainee):
    """Makes versions and publishes them as a store would: a keyframe, steps that are pruned, unions."""

    def __init__(self, *, seed: int = 0, shapes: dict[str, tuple[int, ...]] = SHAPES) -> None:
        super().__init__(seed=seed, shapes=shapes)
        self.union = Union(self.state, POOL)
        self.store = MemoryWeights()
        self.store.add(Available(version=0, num_bytes=0), compress(write_full(self.state, run_id=RUN, pool=POOL)))

    def step(self, change: Callable[[dict[str, Tensor]], None] | None = None) -> None:
        """The next version."""
        if change is None:
            self.train()
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
        raise WeightsGoneError("the file is gone: the head is None")

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
            raise WeightsGoneError(f"version {file.version} is gone")
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


class Followed(Protocol):
    """What an actor is held to: the newest published state, and where it lies."""

    state: State

    @property
    def store(self) -> WeightStore: ...


class FollowingActor:
    def __init__(
        self, learner: Followed, folder: Path, *, max_staleness: int = 2, data_timeout_s: float = 600.0
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


def flip_one_bit(payload: bytes) -> bytes:
    """In the middle, past the zstd header: the frame's checksum or ours must notice."""
    at = len(payload) // 2
    return payload[:at] + bytes([payload[at] ^ 4]) + payload[at + 1 :]
