"""Folders renamed and deleted on storage that may be NFS, which answers some calls otherwise than a local disk does."""

import errno
import logging
import os
import shutil
from pathlib import Path

logger = logging.getLogger(__name__)

_HELD_OPEN = (errno.ENOTEMPTY, errno.EBUSY, errno.ENOENT)
"""A file that somebody has open stays, as .nfsXXXX, until it is closed, and then goes by itself."""


def give_name(partial: Path, final: Path, *, last_file: str) -> None:
    """Rename the whole folder ``partial`` to ``final``, a name that nobody else uses.

    Args:
        last_file: name of a file that is there when everything is.
    """
    try:
        os.rename(partial, final)
    except FileNotFoundError:
        # The reply to a rename that was done can get lost; the call is sent again, and finds nothing to rename.
        if not (final / last_file).is_file():
            raise


def delete_folder(folder: Path) -> None:
    """Delete it, or as much as goes, with a warning, while somebody has a file in it open."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        if error.errno not in _HELD_OPEN:
            raise
        logger.warning("%s cannot be deleted yet, a file in it is open: %s; the next prune tries again", folder, error)
