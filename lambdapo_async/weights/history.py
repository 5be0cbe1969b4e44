"""All versions that a store's files lead to, and each of them as a state."""

import os
from collections.abc import Iterator
from concurrent.futures import Executor
from typing import Protocol

from lambdapo_async.errors import WeightsError
from lambdapo_async.weights.catch_up import Available, plan_catch_up
from lambdapo_async.weights.delta_file import DeltaFile, read_delta, read_full
from lambdapo_async.weights.manifest import name_of
from lambdapo_async.weights.state import State
from lambdapo_async.weights.tensor_file import Payload


class WeightFiles(Protocol):
    """The part of ``interface.WeightStore`` that looks at what is there."""

    def head(self) -> int | None:
        """Newest whole version; None before the first."""

    def files(self) -> tuple[Available, ...]:
        """Every file that can be fetched now."""

    def fetch(self, file: Available) -> Payload:
        """Its bytes, verified; ``WeightsError`` when gone or damaged."""


class WeightHistory:
    """The files as they were when this was made; deltas are kept once fetched, full versions are not."""

    def __init__(self, store: WeightFiles, *, run_id: str, pool: Executor) -> None:
        self.files = store.files()
        self._store, self._run_id, self._pool = store, run_id, pool
        self._deltas: dict[Available, DeltaFile] = {}

    def versions(self) -> list[int]:
        """Those that can be reconstructed, oldest first."""
        found = set[int]()
        for file in sorted(self.files, key=lambda file: file.version):
            bases = file.bases()
            if bases is None or not found.isdisjoint(bases):
                found.add(file.version)
        return sorted(found)

    def leading_from(self, version: int) -> list[Available]:
        """Deltas that can be applied to ``version``."""
        return [file for file in self.files if version in (file.bases() or ())]

    def claims(self, problems: list[str]) -> Iterator[tuple[int, str, str]]:
        """Version, its checksum and the file that says so, base checksums included; unreadable files are problems."""
        for file in self.files:
            try:
                if file.base_version is None:
                    state = self.full(file)
                    yield state.version, state.checksum(self._pool), name_of(file)
                else:
                    metadata = self.delta(file).metadata
                    yield metadata.version, metadata.checksum, name_of(file)
                    yield metadata.base_version, metadata.base_checksum, name_of(file)
            except WeightsError as error:
                problems.append(f"{name_of(file)}: {error}")

    def state(self, version: int, *, since: State | None = None) -> State:
        """Version ``version``, from nothing or by changing ``since`` in place.

        Raises:
            WeightsError: no way there, or a file is gone or damaged.
        """
        plan = plan_catch_up(self.files, at=None if since is None else since.version, head=version)
        state = since
        for file in plan.files:
            if file.base_version is None:
                state = self.full(file)
            else:
                assert state is not None  # a plan from nothing begins with a full version
                self.apply(file, state)
        assert state is not None
        return state

    def apply(self, file: Available, state: State) -> None:
        """Change ``state`` in place; ``WeightsError`` if that is not what ``file`` says, and nothing is changed."""
        self.delta(file).apply_to(state, run_id=self._run_id, version=file.version, pool=self._pool)

    def full(self, file: Available) -> State:
        """A full version."""
        return read_full(
            self._store.fetch(file),
            run_id=self._run_id,
            version=file.version,
            max_bytes=_memory_bytes(),
            pool=self._pool,
        )

    def delta(self, file: Available) -> DeltaFile:
        """A delta, fetched at most once."""
        if file not in self._deltas:
            self._deltas[file] = read_delta(self._store.fetch(file), max_bytes=_memory_bytes())
        return self._deltas[file]


def _memory_bytes() -> int:
    """Of this machine: no version can be larger than that."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
