"""The processes (ranks) that train one policy together, and what they tell each other.

Rank 0 alone knows Redis, the fence and the metrics: it tells the others what to do, message by message, and they do the
same work on their share. Messages are plain bytes on a CPU group of their own, so a rank that waits for the next one
keeps no GPU busy. When a process dies its connections close: the others raise :class:`RankLostError`, none waits on.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lambdapo_async.errors import ConfigError, RankLostError

COLLECTIVE_TIMEOUT_S = 600.0
"""Longest that one rank may lag behind another within a step or a checkpoint."""
MESSAGE_TIMEOUT_S = 1200.0
"""Longest silence of rank 0 before the others take it for frozen; above what a publish may take."""
PULSE_S = 30.0
"""Silence after which :meth:`Ranks.pulse` says something."""


@dataclass(slots=True, eq=False)
class Ranks:
    """One process's view of all; a process that trains alone is rank 0 of 1 and never opens a group."""

    rank: int = 0
    world_size: int = 1
    mesh: DeviceMesh | None = None
    """One dimension over all ranks, on the device they train on; None for a process alone."""
    messages: dist.ProcessGroup | None = None
    """CPU group of messages and checkpoints; None for a process alone."""
    context: dist.ProcessGroup | None = None
    """The neighbours that share each sequence with this rank; None where each rank has its own."""
    ranks_here: int = 1
    """Those on this machine, this one included: they share its memory."""
    _last_message: float = field(default_factory=time.monotonic, init=False)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which talks to Redis and writes what exists once."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there is nobody to share with."""
        return self.world_size == 1

    @property
    def context_size(self) -> int:
        """Ranks that share a sequence."""
        return 1 if self.context is None else self.context.size()

    @property
    def num_shares(self) -> int:
        """Parts that a step's micro-batches are split into."""
        return self.world_size // self.context_size

    @property
    def share_index(self) -> int:
        """The part that this rank trains on, from 0; that of its context neighbours, too."""
        return self.rank // self.context_size

    def send(self, message: bytes) -> None:
        """Rank 0: hand ``message`` to every other rank; returns once they took it.

        Raises:
            RankLostError: a rank died, or took nothing for ``MESSAGE_TIMEOUT_S``.
        """
        if self.is_alone:
            return
        assert self.is_main, "only rank 0 sends"
        self._broadcast(torch.tensor([len(message)]))
        if message:
            # A writable copy: torch warns of read-only buffers.
            self._broadcast(torch.frombuffer(bytearray(message), dtype=torch.uint8))
        self._last_message = time.monotonic()

    def receive(self) -> bytes:
        """The other ranks: the next message; :meth:`pulse` is waited through.

        Raises:
            RankLostError: rank 0 died, or was silent for ``MESSAGE_TIMEOUT_S``.
        """
        assert not self.is_main, "rank 0 receives nothing"
        while True:
            length = torch.zeros(1, dtype=torch.int64)
            self._broadcast(length)
            if int(length) == 0:
                continue
            payload = torch.empty(int(length), dtype=torch.uint8)
            self._broadcast(payload)
            return payload.numpy().tobytes()

    def pulse(self) -> None:
        """Rank 0, while it waits for something outside: tell the others that it is alive, now and then."""
        if time.monotonic() - self._last_message > PULSE_S:
            self.send(b"")

    def share(self, message: bytes) -> bytes:
        """On all ranks: rank 0's ``message``; what the others pass is ignored."""
        if self.is_alone:
            return message
        if not self.is_main:
            return self.receive()
        self.send(message)
        return message

    def add_up(self, sums: Mapping[str, float]) -> dict[str, float]:
        """On all ranks: each name's sum over the shares, in float64; every rank passes the same names.

        Ranks with one share pass the same numbers, of which the first rank's count.
        """
        if self.is_alone:
            return dict(sums)
        names = sorted(sums)
        counts = self.rank % self.context_size == 0
        total = torch.tensor([sums[name] * counts for name in names], dtype=torch.float64)
        with _naming_a_lost_rank():
            dist.all_reduce(total, group=self.messages)
        return dict(zip(names, total.tolist(), strict=True))

    def collect(self, columns: Sequence[Tensor]) -> list[list[Tensor]]:
        """On all ranks: every share's ``columns``, in order; each rank passes equally many.

        Ranks with one share pass the same columns, of which the first rank's are taken.

        Args:
            columns: [any length] float32, without gradient.

        Returns:
            ``num_shares`` lists of CPU tensors, the same on every rank.
        """
        if self.is_alone:
            return [[column.cpu() for column in columns]]
        lengths = self._gather(torch.tensor([len(column) for column in columns]))
        longest = max(int(each.sum()) for each in lengths)
        packed = torch.cat([*(column.cpu() for column in columns), torch.zeros(longest)])[:longest]
        gathered = [
            list(torch.split(each[: int(sizes.sum())], sizes.tolist()))
            for each, sizes in zip(self._gather(packed), lengths, strict=True)
        ]
        return gathered[:: self.context_size]

    def wait_for_all(self) -> None:
        """On all ranks: return when every rank has come here."""
        self.add_up({"arrived": 1.0})

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's ``tensor``, all of one shape."""
        found = [torch.empty_like(tensor) for _ in range(self.world_size)]
        with _naming_a_lost_rank():
            dist.all_gather(found, tensor, group=self.messages)
        return found

    def _broadcast(self, tensor: Tensor) -> None:
        with _naming_a_lost_rank():
            dist.broadcast(tensor, src=0, group=self.messages)


ALONE = Ranks()
"""A process without others."""


@contextmanager
def join_ranks(device: torch.device, *, context_size: int = 1) -> Iterator[Ranks]:
    """Meet the other ranks that torchrun started; without torchrun, or with one process, nothing is opened.

    Args:
        device: what the ranks train on; each takes the CUDA device of its ``LOCAL_RANK``.
        context_size: ``learner.context_parallel``.

    Raises:
        ConfigError: torchrun started more processes here than there are CUDA devices, or a number that
            ``context_size`` does not divide.
        RankLostError: not all ranks came within ``COLLECTIVE_TIMEOUT_S``.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield share_sequences(ALONE, context_size)
        return
    if device.type == "cuda":
        _take_device(int(os.environ["LOCAL_RANK"]))
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    with _naming_a_lost_rank():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timeout)
        messages = dist.new_group(backend="gloo", timeout=timedelta(seconds=MESSAGE_TIMEOUT_S))
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        ranks_here = int(os.environ["LOCAL_WORLD_SIZE"])
        joined = Ranks(dist.get_rank(), dist.get_world_size(), mesh, messages, ranks_here=ranks_here)
        ranks = share_sequences(joined, context_size)
    yield ranks
    # Only after success: once a rank is lost this would wait for it, and the end of the process closes all anyway.
    dist.destroy_process_group()


def share_sequences(ranks: Ranks, context_size: int) -> Ranks:
    """On all ranks: the same ranks, of which ``context_size`` neighbours each share their sequences.

    Raises:
        ConfigError: the ranks cannot be divided so.
    """
    if ranks.world_size % context_size:
        raise ConfigError(
            f"learner.context_parallel = {context_size} does not divide the {ranks.world_size} rank(s) of this "
            f"learner: start it under torchrun with a multiple of {context_size}, as LAMBDAPO_RANKS={context_size} "
            "scripts/launch_learner.sh does, or lower learner.context_parallel"
        )
    if context_size == 1:
        return ranks
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    group, _ = dist.new_subgroups(context_size, timeout=timeout)  # type: ignore[no-untyped-call]
    return replace(ranks, context=group)


def _take_device(local_rank: int) -> None:
    available = torch.cuda.device_count()
    if local_rank >= available:
        raise ConfigError(
            f"torchrun started rank {local_rank} of this machine, which has {available} CUDA devices: "
            "lower --nproc-per-node"
        )
    torch.cuda.set_device(local_rank)


@contextmanager
def _naming_a_lost_rank() -> Iterator[None]:
    """torch says "connection closed by peer" in many words and types; all are RuntimeErrors."""
    try:
        yield
    except RuntimeError as error:
        raise RankLostError(f"another rank of this learner died or does not answer: {error!s:.200}") from error
