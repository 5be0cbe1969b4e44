"""From publish to applied: one learner, a real Redis, and followers behind a link each.

Followers are threads with a connection and a mirror of their own, all on this machine: what they decode and apply at
once they would do on as many machines; with one follower ``busy_s`` is what it takes alone. Redis keeps no file of
what it is sent, or a disk would be measured.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from benchmarks.weights.codec import check_same
from benchmarks.weights.encodings import OURS, Encoding, all_encodings
from lambdapo_async.broker.connection import connect
from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.weights.catch_up import Available
from lambdapo_async.weights.gaps import changed_positions
from lambdapo_async.weights.manifest import NewFile
from lambdapo_async.weights.redis_store import RedisWeightStore
from lambdapo_async.weights.state import State
from lambdapo_async.weights.tensor_file import Payload

LINKS: Mapping[str, float | None] = MappingProxyType({"loopback": None, "1 Gbit/s": 1e9, "100 Mbit/s": 1e8})
"""Bits per second of each follower's link."""
LONGEST_SLEEP_S = 1.0
"""A token bucket that is empty for longer is waited for on paper: the rest is added to the result."""
TIMEOUT_S = 120.0
FENCE = 1


@dataclass(frozen=True)
class DeliveryResult:
    """One version on its way to all followers; times in seconds from the start of encoding."""

    shape: str
    encoding: str
    link: str
    followers: int
    num_bytes: int
    encode_s: float
    publish_s: float
    """Until Redis has it."""
    fetch_s: float
    """Median over the followers."""
    busy_s: float
    """Decode and apply, median over the followers."""
    first_applied_s: float
    all_applied_s: float
    waited_on_paper_s: float
    """Part of these that the link was not really waited for."""


@dataclass(frozen=True)
class _Arrival:
    fetch_s: float
    busy_s: float
    applied_at: float
    owed_s: float
    applied: State


class Link:
    """A token bucket behind a store's fetch: what comes faster than the link waits."""

    def __init__(self, store: RedisWeightStore, bits_per_s: float | None) -> None:
        self._store, self._bits_per_s = store, bits_per_s

    def fetch(self, file: Available) -> tuple[Payload, float]:
        """The file, and the seconds that remain to be added."""
        started = time.monotonic()
        payload = self._store.fetch(file)
        if self._bits_per_s is None:
            return payload, 0.0
        missing_s = max(0.0, 8 * len(payload) / self._bits_per_s - (time.monotonic() - started))
        slept_s = min(missing_s, LONGEST_SLEEP_S)
        time.sleep(slept_s)
        return payload, missing_s - slept_s


class Delivery:
    """One shape's two versions, and mirrors of the first."""

    def __init__(self, shape: str, old: State, new: State, *, url: str, pool: Executor) -> None:
        old.checksum(pool)
        self._shape, self._old, self._new, self._url, self._pool = shape, old, new, url, pool
        self._mirrors: list[State] = []
        self._changed = {name: _changed(old, new, name) for name in new.tensors}
        self._num_runs = 0
        self._forget_all()

    def measure(self, followers: int, *, memory: float, repeats: int) -> Iterator[DeliveryResult]:
        """Every encoding over every link to ``followers``, the fastest of ``repeats``.

        What needs more than ``memory`` bytes is left out.
        """
        while len(self._mirrors) < followers:
            self._mirrors.append(self._old.copy())
        for encoding in all_encodings(self._pool):
            needed = self._needed_bytes(encoding, followers)
            if needed > memory:
                print(f"{self._shape}  {encoding.name} to {followers}: left out, it needs {needed / 1e9:.1f} GB")
                continue
            encode_s, payload = min((self._encode(encoding) for _ in range(repeats)), key=lambda each: each[0])
            for link in LINKS:
                results = [self._deliver(encoding, payload, encode_s, link, followers) for _ in range(repeats)]
                yield min(results, key=lambda result: result.all_applied_s)

    def _encode(self, encoding: Encoding) -> tuple[float, bytes]:
        fresh = State(self._new.version, self._new.tensors)  # its digests are part of the work
        started = time.monotonic()
        payload = encoding.encode(self._old, fresh)
        return time.monotonic() - started, payload

    def _needed_bytes(self, encoding: Encoding, followers: int) -> float:
        """Mirrors, and for encodings that go through the whole model: payload, Redis's copy, and two per follower."""
        is_sparse = encoding.name == OURS or "gap" in encoding.name or "int32" in encoding.name
        mirrors = followers * self._new.num_bytes
        return mirrors if is_sparse else mirrors + self._new.num_bytes * (2 + 2 * followers)

    def _deliver(
        self, encoding: Encoding, payload: bytes, encode_s: float, link: str, followers: int
    ) -> DeliveryResult:
        self._num_runs += 1
        with contextlib.ExitStack() as stack:
            runs = [self._open_run(stack) for _ in range(followers + 1)]
            runs[0].run_store.create(b"{}", {}, fence=FENCE)
            threads = stack.enter_context(ThreadPoolExecutor(followers))
            waiting = [
                threads.submit(self._follow, encoding, Link(run.weights, LINKS[link]), run.weights, mirror)
                for run, mirror in zip(runs[1:], self._mirrors, strict=False)
            ]
            started = time.monotonic()
            file = NewFile(Available(version=self._new.version, num_bytes=len(payload)), payload)
            runs[0].weights.publish(self._new.version, [file], consumed=0, fence=FENCE)
            publish_s = time.monotonic() - started
            arrivals = [each.result(TIMEOUT_S) for each in waiting]
        self._forget_all()
        for arrival, mirror in zip(arrivals, self._mirrors, strict=False):
            check_same(encoding, arrival.applied, self._new)
            self._restore(mirror)
        applied = [encode_s + arrival.applied_at - started + arrival.owed_s for arrival in arrivals]
        return DeliveryResult(
            shape=self._shape,
            encoding=encoding.name,
            link=link,
            followers=followers,
            num_bytes=len(payload),
            encode_s=encode_s,
            publish_s=publish_s,
            fetch_s=median(arrival.fetch_s + arrival.owed_s for arrival in arrivals),
            busy_s=median(arrival.busy_s for arrival in arrivals),
            first_applied_s=min(applied),
            all_applied_s=max(applied),
            waited_on_paper_s=max(arrival.owed_s for arrival in arrivals),
        )

    def _forget_all(self) -> None:
        with contextlib.closing(connect(self._url, timeout_s=TIMEOUT_S)) as client:
            client.config_set("appendonly", "no")
            client.flushall()

    def _open_run(self, stack: contextlib.ExitStack) -> RedisRun:
        run_id = f"{self._shape}-{self._num_runs}"
        return stack.enter_context(contextlib.closing(RedisRun(self._url, run_id, timeout_s=TIMEOUT_S)))

    def _follow(self, encoding: Encoding, link: Link, store: RedisWeightStore, mirror: State) -> _Arrival:
        if store.wait_newer(-1, timeout_s=TIMEOUT_S) is None:
            raise SystemExit("nothing was published")
        (file,) = store.files()
        started = time.monotonic()
        payload, owed_s = link.fetch(file)
        fetched = time.monotonic()
        applied = encoding.decode(payload, mirror)
        applied_at = time.monotonic()
        return _Arrival(fetched - started, applied_at - fetched, applied_at, owed_s, applied)

    def _restore(self, mirror: State) -> None:
        """Back to the old version, where it was changed."""
        for name, at in self._changed.items():
            mirror.tensors[name].bits[at] = self._old.tensors[name].bits[at]
            mirror.adopt_digest(name, self._old)
        mirror.version = self._old.version


def _changed(old: State, new: State, name: str) -> NDArray[np.int64]:
    blocks = changed_positions(old.tensors[name].bits, new.tensors[name].bits)
    return np.concatenate([np.empty(0, np.int64), *blocks])
