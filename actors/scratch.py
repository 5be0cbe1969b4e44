"""The folder of one actor: its model files, the engine's sockets, each weight version on its way in."""

import contextlib
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "lambdapo-actor-"
_MEMORY = Path("/dev/shm")


@contextlib.contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """A folder that ends with the block; those of killed actors of this user are removed first.

    Args:
        parent: where it lies; None is memory where there is some, else the system's temporary folder.
    """
    if parent is None:
        parent = _MEMORY if _MEMORY.is_dir() else Path(tempfile.gettempdir())
    _remove_abandoned(parent)
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent))
    try:
        with _locked(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        match = re.fullmatch(rf"{_PREFIX}(\d+)-.*", folder.name)
        with contextlib.suppress(OSError):  # gone meanwhile, or its owner lives
            if match and not _lives(int(match[1])) and _is_our_folder(folder):
                # Containers may share this memory and not their process numbers: a held lock says more than the number.
                with _locked(folder):
                    shutil.rmtree(folder, ignore_errors=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _is_our_folder(folder: Path) -> bool:
    status = folder.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which ends with its processes; ``BlockingIOError`` when another holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
