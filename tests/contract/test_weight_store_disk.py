"""Weight files on a filesystem behind Redis, on this machine or elsewhere."""

import importlib.abc
import sys
from pathlib import Path

import pytest
import redis

from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.config.weights import WeightsConfig
from lambdapo_async.errors import ConfigError, WeightsError, WeightsGoneError
from lambdapo_async.weights.fsspec_store import read_file
from lambdapo_async.weights.manifest import Manifest
from tests.weight_files import full, publish


def test_on_a_disk_redis_holds_no_payload(started: RedisRun, server: redis.Redis, tmp_path: Path) -> None:
    publish(started.weights_for(WeightsConfig(store=f"file://{tmp_path}")), full(1, b"payload"))
    assert server.exists(started.keys.weights_chunk("1.full", 0)) == 0
    (path,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert path.read_bytes() == b"payload"


@pytest.mark.parametrize(("damage", "message"), [("flip", "damaged"), ("cut", "damaged"), ("lose", "gone")])
def test_damage_on_a_disk_is_named(started: RedisRun, tmp_path: Path, damage: str, message: str) -> None:
    publish(started.weights_for(WeightsConfig(store=f"file://{tmp_path}")), full(1, b"payload"))
    (path,) = (path for path in tmp_path.rglob("*") if path.is_file())
    match damage:
        case "flip":
            path.write_bytes(b"pAyload")
        case "cut":
            path.write_bytes(b"payloa")
        case "lose":
            path.unlink()
    with pytest.raises(WeightsError, match=rf"1\.full is {message}") as caught:
        started.weights.fetch(full(1, b"payload").available)
    assert isinstance(caught.value, WeightsGoneError) == (damage == "lose")


def test_a_folder_that_cannot_be_written_to_is_named(started: RedisRun, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"check weights\.store"):
        publish(started.weights_for(WeightsConfig(store=f"file://{tmp_path}/file")), full(1))
    assert started.weights.head() is None


def test_a_filesystem_that_nobody_knows_is_a_config_error(started: RedisRun) -> None:
    with pytest.raises(ConfigError, match=r"weights\.store: this machine cannot open nonsense://"):
        started.weights_for(WeightsConfig(store="nonsense://x"))


class AbsentDriver(importlib.abc.MetaPathFinder):
    """Makes one package look as if it was not installed, on this machine or elsewhere."""

    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        if name.partition(".")[0] == self._package:
            raise ImportError(f"No module named {name!r}")


@pytest.fixture
def without_s3fs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.meta_path", [AbsentDriver("s3fs"), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "s3fs", raising=False)


@pytest.mark.usefixtures("without_s3fs")
def test_a_driver_that_is_not_installed_is_named(started: RedisRun) -> None:
    expected = r"cannot open s3://: Install s3fs .* and at every actor"
    with pytest.raises(ConfigError, match=expected):
        started.weights_for(WeightsConfig(store="s3://bucket/weights"))
    file = full(1, b"payload")
    manifest = Manifest.elsewhere(file, "s3://bucket/weights/1.full")
    with pytest.raises(ConfigError, match=expected):  # at an actor, which learns of the URL from the manifest
        read_file(manifest, lambda: None)
