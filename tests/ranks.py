"""Ranks under test: real processes with a real gloo group, a deadline, and the error of the one that failed."""

import faulthandler
import multiprocessing
import os
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
from torch.distributed import TCPStore

from learner.parallel import ALONE, join_ranks

RankFunction = Callable[..., object]
"""``function(ranks, *arguments)`` of a module that can be imported; tensors come back from :func:`run_ranks`."""

_PRELOADED = ["tests.ranks", "tests.tiny_models", "torch.distributed.tensor", "torch.distributed.fsdp"]
_LOOPBACK = "127.0.0.1"


def run_ranks(
    folder: Path,
    world_size: int,
    function: RankFunction,
    *arguments: object,
    deadline_s: float = 90.0,
    killed: Collection[int] = (),
) -> list[object]:
    """Run ``function`` on every rank; returns what each returned, which tensors, numbers and text may be in.

    The ranks in ``killed`` may end without a word. As under torchrun the ranks meet at a store that somebody else
    serves: here this process, on a port it picked.
    """
    store = TCPStore(_LOOPBACK, 0, world_size, is_master=True, wait_for_workers=False)
    spawn = multiprocessing.get_context("forkserver")
    spawn.set_forkserver_preload(_PRELOADED)
    results = [folder / f"rank-{rank}.pt" for rank in range(world_size)]
    ends = []
    processes = []
    for rank, result in enumerate(results):
        ours, theirs = spawn.Pipe(duplex=False)
        job = (function, arguments, rank, world_size, store.port, result, theirs)
        processes.append(spawn.Process(target=_run_rank, args=job, daemon=True))
        processes[-1].start()
        theirs.close()
        ends.append(ours)
    try:
        _await_all(ends, deadline_s, killed)
    finally:
        for process in processes:
            process.kill()
            process.join(30)
    return [torch.load(result, weights_only=True) for result in results]


def _await_all(ends: Sequence[Connection], deadline_s: float, killed: Collection[int]) -> None:
    """Return when every rank said it is done; fail with the first traceback."""
    deadline = time.monotonic() + deadline_s
    waiting = {end: rank for rank, end in enumerate(ends)}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise AssertionError(f"ranks {sorted(waiting.values())} are not done after {deadline_s:g} s")
        for end in ready:
            rank = waiting.pop(end)  # type: ignore[call-overload]
            try:
                problem = end.recv()  # type: ignore[union-attr]
            except EOFError:
                problem = "" if rank in killed else "it was killed"
            if problem:
                raise AssertionError(f"rank {rank} failed: {problem}")


def _run_rank(
    function: RankFunction,
    arguments: Sequence[object],
    rank: int,
    world_size: int,
    port: int,
    result: Path,
    end: Connection,
) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    warnings.filterwarnings("error", message="FSDP2-wrapped module")  # pytest's filters end at its own process
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR=_LOOPBACK,
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        GLOO_SOCKET_IFNAME="lo",
    )
    try:
        with join_ranks(torch.device("cpu")) as ranks:
            outcome = function(ranks, *arguments)
        torch.save(outcome, result)
        end.send("")
    except BaseException:
        end.send(traceback.format_exc())
        raise


def alone(function: RankFunction, *arguments: object) -> object:
    """The same function in this process, without others."""
    return function(ALONE, *arguments)
