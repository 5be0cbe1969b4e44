"""The newest weights on the host: one safetensors file, mapped into memory and changed in place by every delta.

The engine's process maps the same file, so no version is ever written or copied as a whole, except for full ones.
"""

import json
import mmap
import os
import time
from collections.abc import Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from lambdapo_async.errors import WeightsError
from lambdapo_async.weights.catch_up import Available
from lambdapo_async.weights.delta_file import read_delta, read_full
from lambdapo_async.weights.state import State
from lambdapo_async.weights.tensor_file import MAX_HEADER_BYTES, BitTensor, Payload

_THREADS = 4
"""One tensor each; more would take from the engine on its own host."""


class Mirror:
    """One whole version, every bit of it proven, or nothing. Not thread-safe: one caller at a time.

    Whatever goes wrong, even a write that is cut short, leaves nothing rather than a mixture; and the file lies in a
    folder that ends with its process, so no other one can take it for a version.
    """

    def __init__(self, folder: Path, *, run_id: str) -> None:
        """Empty; ``folder`` must have room for the weights, and for two of them while a full version comes in."""
        self.path = folder / "mirror.safetensors"
        """The version as a plain safetensors file; nobody may write to it while an engine loads it."""
        self.decode_s = self.apply_s = 0.0
        """Seconds since the start."""
        self._run_id = run_id
        self._pool = ThreadPoolExecutor(min(_THREADS, len(os.sched_getaffinity(0))), thread_name_prefix="mirror")
        self._state: State | None = None
        self._mapped: State | None = None
        """The tensors as they lie in the file; a delta may leave some of the state's outside it."""
        self._changed: Set[str] | None = None

    @property
    def version(self) -> int | None:
        """What it holds; None if nothing."""
        return None if self._state is None else self._state.version

    @property
    def checksum(self) -> str | None:
        """``xxh3_128:<hex>`` of what it holds; None if nothing."""
        return None if self._state is None else self._state.checksum(self._pool)

    @property
    def changed(self) -> Set[str] | None:
        """Names of tensors that may differ from what ``mark_loaded`` saw; None is all of them."""
        return self._changed

    def mark_loaded(self) -> None:
        """The engine has what this holds."""
        self._changed = frozenset()

    def drop(self) -> None:
        """Hold nothing: the next version must be a full one."""
        self._state = self._mapped = self._changed = None

    def advance(self, file: Available, payload: Payload) -> None:
        """Become version ``file.version``.

        Args:
            file: what was fetched.
            payload: its bytes, compressed or plain.

        Raises:
            WeightsError: they are damaged, not what ``file`` says, or do not follow what this holds, which is lost.
        """
        state = self._state
        self._state = None
        if file.base_version is None:
            self._state = self._replaced(file.version, payload)
            self._changed = None
        elif state is None:
            raise WeightsError(f"version {file.version} changes {file.base_version}, and this mirror holds nothing")
        else:
            self._state = self._changed_by(state, file.version, payload)

    def _replaced(self, version: int, payload: Payload) -> State:
        started = time.monotonic()
        state = read_full(payload, run_id=self._run_id, version=version, max_bytes=_memory_bytes(), pool=self._pool)
        self.decode_s += time.monotonic() - started
        return self._written(state)

    def _changed_by(self, state: State, version: int, payload: Payload) -> State:
        started = time.monotonic()
        delta_file = read_delta(payload, max_bytes=state.num_bytes + MAX_HEADER_BYTES)
        decoded = time.monotonic()
        self.decode_s += decoded - started
        delta_file.apply_to(state, run_id=self._run_id, version=version, pool=self._pool)
        self.apply_s += time.monotonic() - decoded
        if self._changed is not None:
            self._changed = self._changed | delta_file.delta.changes.keys()
        return self._brought_home(state)

    def _brought_home(self, state: State) -> State:
        """Write the tensors that a delta replaced into the file, too."""
        mapped = self._mapped
        if mapped is None or not _have_same_layout(state, mapped):
            return self._written(state)
        started = time.monotonic()
        for name, tensor in state.tensors.items():
            if tensor.bits is not mapped.tensors[name].bits:
                mapped.tensors[name].bits[:] = tensor.bits
        self.apply_s += time.monotonic() - started
        return _with_digests_of(state, mapped)

    def _written(self, state: State) -> State:
        """``state`` in a new file; whoever still maps the old one keeps it."""
        started = time.monotonic()
        partial = self.path.with_suffix(".partial")
        self._mapped = write_mapped(partial, state)
        partial.replace(self.path)
        self.apply_s += time.monotonic() - started
        return _with_digests_of(state, self._mapped)


def write_mapped(path: Path, state: State) -> State:
    """Write ``state`` to ``path`` as plain safetensors; the same tensors in that file's memory, writable.

    Raises:
        WeightsError: no room for it.
    """
    names = sorted(state.tensors, key=lambda name: (-state.tensors[name].bits.itemsize, name))  # keeps all aligned
    header: dict[str, object] = {}
    end = 0
    for name in names:
        tensor = state.tensors[name]
        begin, end = end, end + tensor.bits.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (begin, end)}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    memory = _map_new_file(path, 8 + len(head) + end)
    memory[: 8 + len(head)] = len(head).to_bytes(8, "little") + head
    return State(state.version, dict(_copied_into(memory, 8 + len(head), [(n, state.tensors[n]) for n in names])))


def _copied_into(memory: mmap.mmap, offset: int, tensors: list[tuple[str, BitTensor]]) -> list[tuple[str, BitTensor]]:
    copies = []
    for name, tensor in tensors:
        bits = np.ndarray(tensor.bits.shape, tensor.bits.dtype, buffer=memory, offset=offset)
        bits[:] = tensor.bits
        offset += bits.nbytes
        copies.append((name, BitTensor(tensor.dtype, tensor.shape, bits)))
    return copies


def _map_new_file(path: Path, num_bytes: int) -> mmap.mmap:
    with path.open("wb+") as file:
        try:
            # Else a full disk, or a container's small /dev/shm, would show itself as a SIGBUS at the first write.
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        except OSError as error:
            raise WeightsError(
                f"no room for the {num_bytes} bytes of the weights in {path.parent}: {error.strerror}; make some, or "
                "set actor.mirror = 'disk'"
            ) from error
        return mmap.mmap(file.fileno(), num_bytes)


def _with_digests_of(state: State, mapped: State) -> State:
    """``state`` with its bits in the file and no digest to be computed anew."""
    homely = State(state.version, mapped.tensors)
    for name in homely.tensors:
        homely.adopt_digest(name, state)
    return homely


def _have_same_layout(state: State, mapped: State) -> bool:
    return state.tensors.keys() == mapped.tensors.keys() and all(
        tensor.is_like(mapped.tensors[name]) for name, tensor in state.tensors.items()
    )


def _memory_bytes() -> int:
    """Of this machine: no full version can be larger than that."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
