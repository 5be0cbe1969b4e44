"""The last published version, bit for bit, and the files that make the next one of it."""

import time
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from lambdapo_async.config.weights import WeightsConfig
from lambdapo_async.errors import ConfigError, WeightsError
from lambdapo_async.weights.catch_up import Available
from lambdapo_async.weights.delta_file import DeltaFile, make_delta, write_full
from lambdapo_async.weights.manifest import NewFile
from lambdapo_async.weights.state import State, for_each
from lambdapo_async.weights.tensor_file import compress
from lambdapo_async.weights.union import Union

DENSE = 0.5
"""Once more than this share of the elements changes with every version, versions go out whole: measured, a step of
95 % is half as large as a keyframe and takes ten times the processor time."""


@dataclass(frozen=True, slots=True)
class Extent:
    """What leads from nothing to a version."""

    keyframe_bytes: int
    union_bytes: int
    """0 without a union."""
    tail_bytes: int
    """Of the steps after the union, or after the keyframe if there is none."""
    tail_steps: int

    @property
    def num_bytes(self) -> int:
        """Of all of it."""
        return self.keyframe_bytes + self.union_bytes + self.tail_bytes

    def with_step(self, num_bytes: int) -> "Extent":
        """With one more step."""
        return Extent(self.keyframe_bytes, self.union_bytes, self.tail_bytes + num_bytes, self.tail_steps + 1)

    def with_union(self, num_bytes: int) -> "Extent":
        """With a union in place of the steps and of the union before."""
        return Extent(self.keyframe_bytes, num_bytes, 0, 0)


@dataclass(frozen=True, slots=True)
class Release:
    """One version, ready to be published."""

    state: State
    files: tuple[NewFile, ...]
    extent: Extent
    """Once it is published."""
    changed_share: float
    """Elements that differ from the version before; 1 without one."""
    encode_s: float

    @property
    def is_keyframe(self) -> bool:
        """Whether the version can be had without any base."""
        return any(file.available.base_version is None for file in self.files)

    @property
    def has_union(self) -> bool:
        """Whether a union file is among the files."""
        return any(file.available.base_min is not None for file in self.files)

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(len(file.payload) for file in self.files)


@dataclass(frozen=True, slots=True)
class _Published:
    """The newest version that the store took."""

    state: State
    extent: Extent
    union: Union
    """Everything that changed since the keyframe; what was prepared and never published may be in it, too."""
    changed_share: float
    """Of the step that led here."""


class WeightMirror:
    """Makes each version's files from the version before. Not thread-safe.

    ``prepare`` changes nothing that a reader could notice: only ``advance``, after the store took the version, makes
    it the base of the next. So versions that were never published leave no trace in those that are.
    """

    def __init__(self, *, run_id: str, config: WeightsConfig, pool: Executor) -> None:
        self._run_id, self._config, self._pool = run_id, config, pool
        self._published: _Published | None = None

    def prepare(self, state: State, *, head: int | None) -> Release:
        """The files of the next version.

        Args:
            state: kept as it is from here on; of a version above all before.
            head: what the store calls its newest version. Unless it is the one that we published last, nothing is
                known of what the readers have, and the version goes out whole: after a restart, after a publish
                that may or may not have succeeded, after a Redis that lost its last second.

        Raises:
            ConfigError: two keyframes do not fit into the byte budget.
        """
        started, last = time.perf_counter(), self._published
        if last is None or head != last.state.version or not _is_same_model(last.state, state):
            return self._whole(state, started)
        if last.changed_share > DENSE and (share := self._changed_share(last.state, state)) > DENSE:
            return self._whole(state, started, changed_share=share)
        delta = make_delta(
            last.state, state, run_id=self._run_id, keyframe_version=last.union.keyframe_version, pool=self._pool
        )
        step = _delta_file(delta)
        return self._after_step(last, state, delta, step, started)

    def _after_step(self, last: _Published, state: State, delta: DeltaFile, step: NewFile, started: float) -> Release:
        """The step, and with it the union or the keyframe that is due."""
        extent, share = last.extent.with_step(len(step.payload)), delta.metadata.changed / max(1, state.numel)
        if self._is_tight(extent, step):
            return self._whole(state, started, changed_share=share)
        is_union_due = self._is_union_due(extent)
        if is_union_due and share > self._config.keyframe_share:  # so more than that changed since the keyframe
            return self._whole(state, started, step=step, changed_share=share)
        last.union.record(delta.delta)
        if not is_union_due:
            return Release(state, (step,), extent, share, time.perf_counter() - started)
        if last.union.changed_share() > self._config.keyframe_share:
            return self._whole(state, started, step=step, changed_share=share)
        union = _delta_file(last.union.file(state, run_id=self._run_id, pool=self._pool))
        extent = extent.with_union(len(union.payload))
        return Release(state, (step, union), extent, share, time.perf_counter() - started)

    @property
    def version(self) -> int:
        """What the store took last, as far as is known; -1 before the first."""
        return -1 if self._published is None else self._published.state.version

    @property
    def keyframe_version(self) -> int:
        """Newest keyframe at or before what the store took last; -1 before the first."""
        return -1 if self._published is None else self._published.union.keyframe_version

    def checksum(self) -> str:
        """Of the version that the store took last; ``WeightsError`` before the first."""
        if self._published is None:
            raise WeightsError("nothing was published yet: there is no state to take a checksum of")
        return self._published.state.checksum(self._pool)

    def advance(self, release: Release) -> None:
        """The store took ``release``."""
        last = self._published
        union = Union(release.state, self._pool) if last is None or release.is_keyframe else last.union
        self._published = _Published(release.state, release.extent, union, release.changed_share)

    def _whole(
        self, state: State, started: float, *, step: NewFile | None = None, changed_share: float = 1.0
    ) -> Release:
        """A keyframe, and beside it the step for who has the version before, if that is the smaller one."""
        payload = compress(write_full(state, run_id=self._run_id, pool=self._pool))
        self._check_budget(len(payload))
        keyframe = NewFile(Available(version=state.version, num_bytes=len(payload)), payload)
        files = (keyframe, step) if step is not None and len(step.payload) < len(payload) else (keyframe,)
        extent = Extent(keyframe_bytes=len(payload), union_bytes=0, tail_bytes=0, tail_steps=0)
        return Release(state, files, extent, changed_share, time.perf_counter() - started)

    def _changed_share(self, old: State, new: State) -> float:
        """Elements that differ; counting them takes a tenth of the time of collecting them."""
        differing = for_each(
            lambda name: int(np.count_nonzero(old.tensors[name].bits != new.tensors[name].bits)),
            new.largest_first(new.tensors),
            self._pool,
        )
        return sum(differing.values()) / max(1, new.numel)

    def _is_union_due(self, extent: Extent) -> bool:
        is_long = extent.tail_steps >= self._config.union_every
        return is_long or extent.tail_bytes > self._config.keyframe_share * extent.keyframe_bytes

    def _check_budget(self, keyframe_bytes: int) -> None:
        """Say it at the first version, not at the first that replaces it."""
        budget = self._config.budget_bytes
        if budget is not None and 2 * keyframe_bytes > budget:
            raise ConfigError(
                f"weights.max_redis_bytes = {budget} cannot hold two keyframes of {keyframe_bytes} bytes, the old one "
                f"and the one that replaces it: raise it to at least {3 * keyframe_bytes}"
            )

    def _is_tight(self, extent: Extent, step: NewFile) -> bool:
        """Whether after ``step`` the byte budget would hold no new keyframe, and a step like this, beside the rest."""
        budget = self._config.budget_bytes
        needed = extent.num_bytes + extent.keyframe_bytes + len(step.payload)
        return budget is not None and needed > budget


def _is_same_model(old: State, new: State) -> bool:
    return _layout(old) == _layout(new)


def _layout(state: State) -> Mapping[str, tuple[str, tuple[int, ...]]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in state.tensors.items()}


def _delta_file(file: DeltaFile) -> NewFile:
    payload, about = file.to_bytes(), file.metadata
    available = Available(
        version=about.version, num_bytes=len(payload), base_version=about.base_version, base_min=about.base_min
    )
    return NewFile(available, payload)
