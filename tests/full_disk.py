"""A disk that is full: no file of this process may grow beyond a size."""

import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LIMIT = threading.Lock()
"""The process has one: whoever took another's for its own would put it back for good."""


@contextmanager
def full_disk(num_bytes: int = 0) -> Iterator[None]:
    """Until it ends, what would be written behind ``num_bytes`` of any file is refused by the system."""
    with _LIMIT:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
