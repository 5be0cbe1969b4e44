"""Weight files outside Redis: in any folder that fsspec reaches."""

from collections.abc import Callable

import fsspec
from fsspec.implementations.local import LocalFileSystem

from lambdapo_async.errors import ConfigError, WeightsError, WeightsGoneError
from lambdapo_async.weights.manifest import Manifest, NewFile, name_of

_BLOCK_BYTES = 16 * 2**20


class FsspecFiles:
    """The payloads of one run below a URL.

    A learner's fence is part of every file's name, so that a woken old learner writes over nothing of the new one's.
    """

    def __init__(self, url: str, run_id: str) -> None:
        """``ConfigError`` if this machine has no driver for such a URL."""
        _check_driver(url)
        self._folder = f"{url.rstrip('/')}/{run_id}"

    def manifest(self, file: NewFile, *, fence: int) -> Manifest:
        """Where ``file`` will lie."""
        return Manifest.elsewhere(file, f"{self._folder}/{name_of(file.available)}.{fence}.safetensors.zst")

    def put(self, manifest: Manifest, payload: bytes, *, fence: int) -> None:
        """Write the file, whole or not at all.

        An object store shows an object when it is complete. On a disk the file gets its name when it is.

        Raises:
            WeightsError: the folder cannot be written to.
        """
        filesystem, path = _located(manifest)
        is_disk = isinstance(filesystem, LocalFileSystem)
        written = f"{path}.partial" if is_disk else path
        try:
            filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
            filesystem.pipe_file(written, payload)
            if is_disk:
                filesystem.mv(written, path)
        except OSError as error:
            raise WeightsError(f"{manifest.url}: {error}; check weights.store") from error


def read_file(manifest: Manifest, renew: Callable[[], None]) -> bytes:
    """The file's bytes, not verified; ``renew`` is called before each of its 16 MB.

    Raises:
        WeightsGoneError: it is not there any more.
        WeightsError: it cannot be read.
    """
    filesystem, path = _located(manifest)
    blocks: list[bytes] = []
    try:
        for start in range(0, manifest.num_bytes, _BLOCK_BYTES):
            renew()
            blocks.append(filesystem.cat_file(path, start=start, end=min(start + _BLOCK_BYTES, manifest.num_bytes)))
    except FileNotFoundError as error:
        raise WeightsGoneError(
            f"{manifest.name} is gone: no {manifest.url}; does this machine reach the folder?"
        ) from error
    except OSError as error:
        raise WeightsError(f"{manifest.url}: {error}") from error
    return b"".join(blocks)


def delete_file(manifest: Manifest) -> None:
    """Remove the file and what a crash left of it; fine if there is none.

    Raises:
        WeightsError: it cannot be removed.
    """
    filesystem, path = _located(manifest)
    for each in (path, f"{path}.partial"):
        try:
            filesystem.rm_file(each)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise WeightsError(f"{manifest.url}: {error}") from error


def _located(manifest: Manifest) -> tuple[fsspec.AbstractFileSystem, str]:
    assert manifest.url is not None
    _check_driver(manifest.url)
    filesystem, path = fsspec.core.url_to_fs(manifest.url)
    return filesystem, path


def _check_driver(url: str) -> None:
    """Drivers of S3, GCS and others are packages of their own, which learner and actors both need."""
    protocol = url.partition("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"weights.store: this machine cannot open {protocol}://: {error}; whatever is missing must be installed "
            "where the learner runs and at every actor"
        ) from error
