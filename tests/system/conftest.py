"""What the system tests share: one nursery (vLLM is imported once), one starter model."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nursery import Nursery


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    with Nursery(timeout_s=120.0) as running:
        yield running


@pytest.fixture(scope="session")
def output_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of the session; the starter model in it is built once."""
    return tmp_path_factory.mktemp("outputs")
