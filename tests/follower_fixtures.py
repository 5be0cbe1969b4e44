"""A learner with version 0 published, and an actor that is about to follow it."""

from pathlib import Path

import pytest

from tests.following_actor import FollowingActor, Learner


@pytest.fixture
def learner() -> Learner:
    return Learner()


@pytest.fixture
def actor(learner: Learner, tmp_path: Path) -> FollowingActor:
    return FollowingActor(learner, tmp_path / "actor")
