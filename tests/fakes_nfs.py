"""What an NFS client may answer, acted out on a plain folder."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def cached_listing(folder: Path, listing: list[Path], *, is_dropped_by_changes: bool = True) -> Iterator[None]:
    """This client goes on seeing ``listing``; by default, as NFS has it, until it creates something there itself."""
    list_fresh, open_fresh = Path.iterdir, os.open
    cache = {folder: listing}

    def list_cached(path: Path) -> Iterator[Path]:
        return iter(cache[path]) if path in cache else list_fresh(path)

    def open_and_drop(path: str | Path, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & os.O_CREAT and is_dropped_by_changes:
            cache.pop(Path(os.fsdecode(path)).parent, None)
        return open_fresh(path, flags, mode, dir_fd=dir_fd)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "iterdir", list_cached)
        patch.setattr(os, "open", open_and_drop)
        yield


def done_but_answered(call: Callable[..., object], error: OSError) -> Callable[..., object]:
    """The first time ``call`` does its work and the reply is lost: what the caller hears is the repeated call's."""
    lost = [error]

    def answer(*args: object, **kwargs: object) -> object:
        result = call(*args, **kwargs)
        if lost:
            raise lost.pop()
        return result

    return answer


def refused_once(call: Callable[..., object], error: OSError) -> Callable[..., object]:
    """The first time ``call`` does nothing and raises."""
    refusals = [error]

    def answer(*args: object, **kwargs: object) -> object:
        if refusals:
            raise refusals.pop()
        return call(*args, **kwargs)

    return answer
