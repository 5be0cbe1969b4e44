"""A model in Hugging Face's layout: where it lies on this machine, and its files beside the weights."""

import json
from dataclasses import dataclass
from pathlib import Path

import xxhash
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open

from lambdapo_async.errors import ConfigError

CONFIG_FILE = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
FINGERPRINT = "base_fingerprint"
"""Name in the metadata of adapters of ours: :attr:`ModelSource.fingerprint` of what they lie on."""
_SAMPLE_BYTES = 2**16
COMPANION_PATTERNS = (
    CONFIG_FILE,
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)
"""Everything but weights that loads a model or its tokenizer."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model is read from."""

    folder: Path
    """Config, weights and companion files."""
    adapter: Path | None
    """Folder in peft's format whose LoRA adapters lie on those weights."""
    fingerprint: str
    """Of the weights in ``folder``: what adapters are saved with, and compared when they are read."""

    @classmethod
    def locate(cls, path: str, revision: str | None) -> "ModelSource":
        """Find a model, or an adapter and the model that it was trained on.

        Raises:
            ConfigError: neither a folder nor a repo id that can be read, or adapters of other weights than are there.
        """
        folder = Path(path).expanduser()
        # A folder with both is a whole model beside an adapter of somebody's: the model is what was asked for.
        if (folder / CONFIG_FILE).is_file() or not (folder / ADAPTER_CONFIG).is_file():
            found = locate_model(path, revision)
            return cls(found, None, fingerprint(found))
        base = json.loads((folder / ADAPTER_CONFIG).read_bytes())["base_model_name_or_path"]
        try:
            found = locate_model(base, None)
        except ConfigError as error:
            raise ConfigError(
                f"{folder} holds LoRA adapters of the model {base}, which must stay there: {error}"
            ) from error
        source = cls(found, folder, fingerprint(found))
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as adapter:
            trained_on = (adapter.metadata() or {}).get(FINGERPRINT, source.fingerprint)  # others' adapters say nothing
        if trained_on != source.fingerprint:
            raise ConfigError(
                f"{folder} holds LoRA adapters of weights that were in {found}, which holds others now: put them back"
            )
        return source


def locate_model(path: str, revision: str | None) -> Path:
    """The model's local folder; a repo id is downloaded or taken from the cache.

    Raises:
        ConfigError: neither a folder nor a repo id that can be read.
    """
    folder = Path(path).expanduser()
    if (folder / CONFIG_FILE).is_file():
        return folder
    if folder.is_dir():
        raise ConfigError(f"model.path = {path!r} is a folder without config.json: give one in Hugging Face's format")
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=["*.safetensors*", *COMPANION_PATTERNS]))
    except HFValidationError as error:
        raise ConfigError(f"model.path = {path!r}: there is no such folder, and a repo id looks otherwise") from error
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        place = "" if revision is None else f", revision {revision},"
        said = " ".join(str(error).split())
        raise ConfigError(
            f"model.path = {path!r}: there is no such folder, and as a repo id{place} it cannot be read: {said:.300}"
        ) from error


def fingerprint(folder: Path) -> str:
    """Tells two models' weights apart by the size and a sample of each file, without reading them."""
    digest = xxhash.xxh3_128()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            file.seek(path.stat().st_size // 2)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def companion_files(folder: Path) -> dict[str, bytes]:
    """File name -> content of what an actor needs beside the weights; a learner's checkpoint keeps it too."""
    paths = {path for pattern in COMPANION_PATTERNS for path in folder.glob(pattern) if path.is_file()}
    return {path.name: path.read_bytes() for path in sorted(paths)}
