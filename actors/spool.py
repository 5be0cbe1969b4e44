"""An actor's unconfirmed groups on its disk: they outlive the actor, and the next one on this machine sends them."""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, unquote

from lambdapo_async.errors import ConfigError

_LOCK, _SUFFIX = "lock", ".group"


def spool_root(configured: Path | None, run_id: str) -> Path:
    """The folder of a run's spools, ours alone; made if missing.

    Raises:
        ConfigError: it cannot be made, or it is somebody else's.
    """
    base = configured or Path(tempfile.gettempdir()) / f"lambdapo-spool-{os.getuid()}"
    root = base / quote(run_id, safe="")
    with _explained(base):
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Anybody may put a folder of this name into a shared one, and what lies in it would be sent as ours.
        if base.stat().st_uid != os.getuid():
            raise ConfigError(f"{base} belongs to another user: set actor.spool_dir to a folder of your own")
        root.mkdir(mode=0o700, exist_ok=True)
    return root


class Spool:
    """The groups of one producer, one file each, named by their sequence number.

    Whoever has a spool open holds its lock, which the kernel frees with the process. Calls wait for the disk, so they
    belong on a thread.

    Raises:
        ConfigError: the disk is full or refuses otherwise.
    """

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder, self._lock = folder, lock

    @classmethod
    def create(cls, root: Path, producer: str) -> "Spool":
        """An empty spool."""
        folder = root / quote(producer, safe="")
        with _explained(folder):
            folder.mkdir(mode=0o700)
        spool = _locked(folder)
        assert spool is not None, "nobody else knows a new producer's name"
        return spool

    @classmethod
    def adopt(cls, root: Path) -> "list[Spool]":
        """Every spool in ``root`` that nobody holds, ours from now on; empty ones are deleted."""
        adopted = []
        for folder in sorted(path for path in root.iterdir() if path.is_dir()):
            spool = _locked(folder)
            if spool is None:
                continue
            if spool.sequence_numbers():
                adopted.append(spool)
            else:
                spool.close()
        return adopted

    @property
    def producer(self) -> str:
        """Whose groups they are."""
        return unquote(self.folder.name)

    def sequence_numbers(self) -> list[int]:
        """The numbers of the groups that are here, ascending."""
        return sorted(int(path.stem) for path in self.folder.glob(f"*{_SUFFIX}") if path.stem.isdecimal())

    def write(self, seq: int, payload: bytes) -> None:
        """Keep a group; it is on the disk, whole, when this returns."""
        partial = self.folder / f"{seq}.partial"
        with _explained(self.folder):
            with partial.open("wb") as file:
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(self._path(seq))
            self._sync()

    def read(self, seq: int) -> bytes:
        """The group's bytes."""
        with _explained(self.folder):
            return self._path(seq).read_bytes()

    def renumber(self, seq: int, new: int) -> None:
        """Give a group another number, before it is offered under it."""
        with _explained(self.folder):
            self._path(seq).rename(self._path(new))
            self._sync()

    def delete(self, *seqs: int) -> None:
        """Forget groups that are durable elsewhere."""
        with _explained(self.folder):
            for seq in seqs:
                self._path(seq).unlink(missing_ok=True)

    def rename(self, producer: str) -> None:
        """Become the spool of another producer."""
        with _explained(self.folder):
            self.folder = self.folder.rename(self.folder.with_name(quote(producer, safe="")))

    def close(self) -> int:
        """Give it up; returns the number of groups that stay for whoever adopts it. An empty one disappears."""
        num_left = len(self.sequence_numbers())
        try:
            if num_left == 0:
                with _explained(self.folder):
                    for path in self.folder.iterdir():
                        path.unlink(missing_ok=True)  # a cancelled caller's thread may still be deleting
                    self.folder.rmdir()
        finally:
            os.close(self._lock)
        return num_left

    def _path(self, seq: int) -> Path:
        return self.folder / f"{seq}{_SUFFIX}"

    def _sync(self) -> None:
        folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _locked(folder: Path) -> Spool | None:
    """The spool in ``folder`` if nobody else holds it."""
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:  # its owner deleted it a moment ago
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_there = (folder / _LOCK).stat().st_ino == os.fstat(lock).st_ino
    except (BlockingIOError, FileNotFoundError):
        is_there = False
    if not is_there:
        os.close(lock)
        return None
    return Spool(folder, lock)


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}: free it, or set actor.spool_dir to another folder") from error
