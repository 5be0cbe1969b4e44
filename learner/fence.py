"""Fences: numbers that say which learner owns a run, kept where the checkpoints are.

They never come from Redis, which may come back empty or older: a file created with O_EXCL can be won once.
"""

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from lambdapo_async.durable import explaining_refusal, sync
from lambdapo_async.errors import CheckpointError, FencedError
from lambdapo_async.fresh_listing import forget_listing

_FENCE = re.compile(r"fence-(\d+)")


def take_fence(folder: Path) -> int:
    """Win the next number, durably; every earlier owner is fenced off from then on.

    Raises:
        CheckpointError: the disk refused.
    """
    with explaining_refusal(folder, CheckpointError):
        return _take_fence(folder)


def _take_fence(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    fence = newest_fence(folder)
    while True:
        fence += 1
        try:
            descriptor = os.open(folder / f"fence-{fence}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:  # another learner won this number just now
            continue
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{socket.gethostname()} pid {os.getpid()}\n")
        sync(folder / f"fence-{fence}")
        sync(folder)
        return fence


def newest_fence(folder: Path) -> int:
    """The largest number won so far; 0 before the first."""
    matches = (_FENCE.fullmatch(path.name) for path in folder.iterdir())
    return max((int(match[1]) for match in matches if match), default=0)


def check_owner(folder: Path, fence: int) -> None:
    """``FencedError`` once a later learner took over; ``CheckpointError`` when the disk lets nobody see that."""
    with explaining_refusal(folder, CheckpointError):
        forget_listing(folder)
    if (newest := newest_fence(folder)) != fence:
        raise FencedError(f"{folder}: this learner holds fence {fence}, but fence {newest} was taken since: stop it")


@contextlib.contextmanager
def unless_fenced(folder: Path, fence: int) -> Iterator[None]:
    """Whatever goes wrong, ``FencedError`` once a later learner took over: it deletes what others read and write."""
    try:
        yield
    except Exception:
        check_owner(folder, fence)
        raise
