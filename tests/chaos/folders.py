"""Folders of runs under faults: where they are, what they weigh, what can be kept of them."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def bytes_below(folder: Path) -> int:
    """Of all files, at some moment."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # its group was confirmed a moment ago
                total += os.stat(Path(parent) / name).st_size
    return total


@contextlib.contextmanager
def scene_folder(name: str) -> Iterator[Path]:
    """A short path in memory, where fsync is free."""
    parent = "/dev/shm" if Path("/dev/shm").is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix=f"lp-{name}-", dir=parent))
    yield folder
    shutil.rmtree(folder)


def sockets(folder: str, names: list[str]) -> set[str]:
    """What nobody can copy of a scene's folder, for ``shutil.copytree``."""
    return {name for name in names if (Path(folder) / name).is_socket()}
