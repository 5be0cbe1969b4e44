"""A model in Hugging Face's layout: where it lies on this machine, and its files beside the weights."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from lambdapo_async.errors import ConfigError

COMPANION_PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)
"""Everything but weights that loads a model or its tokenizer."""


def locate_model(path: str, revision: str | None) -> Path:
    """The model's local folder; a repo id is downloaded or taken from the cache.

    Raises:
        ConfigError: neither a folder nor a repo id that can be read.
    """
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.is_dir():
        raise ConfigError(f"model.path = {path!r} is a folder without config.json: give one in Hugging Face's format")
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=["*.safetensors*", *COMPANION_PATTERNS]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ConfigError(f"model.path = {path!r} (revision {revision}) cannot be read: {error!s:.300}") from error


def companion_files(folder: Path) -> dict[str, bytes]:
    """File name -> content of what an actor needs beside the weights; a learner's checkpoint keeps it too."""
    paths = {path for pattern in COMPANION_PATTERNS for path in folder.glob(pattern) if path.is_file()}
    return {path.name: path.read_bytes() for path in sorted(paths)}
