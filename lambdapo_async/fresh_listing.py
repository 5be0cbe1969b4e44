"""Listings that show what other machines did: an NFS client may answer from a cache that is up to a minute old."""

import tempfile
from pathlib import Path


def forget_listing(folder: Path) -> None:
    """Make the next listing of ``folder`` a fresh one, by a change: no client keeps a listing beyond its own changes.

    Raises:
        OSError: nothing can be created in ``folder``.
    """
    with tempfile.NamedTemporaryFile(prefix=".probe-", dir=folder):
        pass
