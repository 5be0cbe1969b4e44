"""manifest.json of a checkpoint: size and digest of every file; damage of any is found before it is used."""

from pathlib import Path

import xxhash
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from lambdapo_async.errors import CheckpointError

MANIFEST = "manifest.json"
"""Written last: a folder that has it has everything."""
_HASH_BYTES = 2**24


class _SavedFile(BaseModel):
    """One file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_bytes: NonNegativeInt
    xxh3_128: str


class _Manifest(BaseModel):
    """All files but itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: dict[str, _SavedFile]


def write_manifest(folder: Path) -> None:
    """Take down everything below ``folder``."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = _Manifest(files={str(path.relative_to(folder)): _fingerprint(path) for path in paths})
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1))


def check_manifest(folder: Path) -> None:
    """Compare ``folder`` with what was taken down.

    Raises:
        CheckpointError: a file is missing, damaged or cannot be read.
    """
    try:
        manifest = _Manifest.model_validate_json((folder / MANIFEST).read_bytes())
        for name, expected in manifest.files.items():
            if (found := _fingerprint(folder / name)) != expected:
                raise CheckpointError(f"{folder / name} is damaged: {found} instead of {expected}")
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"checkpoint {folder} cannot be read: {error!s:.300}") from error


def _fingerprint(path: Path) -> _SavedFile:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_HASH_BYTES):
            digest.update(block)
    return _SavedFile(num_bytes=path.stat().st_size, xxh3_128=digest.hexdigest())
