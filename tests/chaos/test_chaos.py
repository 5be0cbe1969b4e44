"""Two hundred faults: in every profile a run is broken twenty times, goes on, ends, and has kept every promise."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.campaign import run_under_faults
from tests.chaos.folders import scene_folder, sockets
from tests.chaos.profiles import PROFILES
from tests.chaos.spec import MAX_STALENESS, VARIANTS

FAULTS_PER_PROFILE = 20


@pytest.fixture
def folder() -> Iterator[Path]:
    with scene_folder("chaos") as path:
        yield path


def test_there_are_two_hundred_of_them() -> None:
    assert FAULTS_PER_PROFILE * len(PROFILES) >= 200


@pytest.mark.system
@pytest.mark.timeout(240)
@pytest.mark.parametrize(("number", "name"), list(enumerate(PROFILES)), ids=str)
def test_a_run_under_faults_keeps_its_promises(folder: Path, number: int, name: str) -> None:
    variant = VARIANTS[number % len(VARIANTS)]
    outcome = run_under_faults(
        folder, PROFILES[name], seed=100 + number, num_faults=FAULTS_PER_PROFILE, variant=variant
    )
    if outcome.violations:
        shutil.copytree(folder, Path("outputs") / f"chaos-{name}", dirs_exist_ok=True, ignore=sockets)
    assert outcome.violations == (), outcome
    assert outcome.num_faults >= FAULTS_PER_PROFILE
    assert outcome.num_groups > 0
    if variant.drop_above == MAX_STALENESS + 1:
        assert outcome.num_stale > 0, "that nothing too old is trained on was not put to the test"


def test_some_profile_has_the_least_staleness() -> None:
    assert any(each.drop_above == MAX_STALENESS + 1 for each in VARIANTS[: len(PROFILES)])
