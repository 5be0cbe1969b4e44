"""Files that survive a power loss, and what is said when the disk refuses them."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from lambdapo_async.errors import CheckpointError, LambdaPOError

WAY_OUT = "free disk space or repair the disk, then try again (a learner with --resume)"
"""What to do when the disk refused."""


def sync(path: Path) -> None:
    """Force a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Force everything below ``folder``, and the folder itself, to disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)


def write_file(path: Path, content: bytes) -> None:
    """Write a file that is not there yet, and force it to disk."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Write ``path`` whole, or leave it as it was; others may be doing the same."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        write_file(partial, content)
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def explaining_refusal(path: Path, kind: type[LambdaPOError]) -> Iterator[None]:
    """An error of this ``kind`` that names ``path`` when the disk refuses: it is full, read-only or broken."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for what the disk says
        raise kind(f"{path} cannot be written: {error}; {WAY_OUT}") from error


@contextlib.contextmanager
def whole_or_gone(partial: Path, final: Path) -> Iterator[None]:
    """``CheckpointError`` when the disk refuses ``final``; what was written of it, in ``partial``, is deleted."""
    try:
        with explaining_refusal(final, CheckpointError):
            yield
    except CheckpointError:
        shutil.rmtree(partial, ignore_errors=True)  # what does not go now goes with the next prune
        raise
