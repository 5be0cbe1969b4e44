"""A state as a checkpoint in Hugging Face's layout: config, tokenizer, safetensors."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from lambdapo_async.durable import sync, write_file
from lambdapo_async.errors import ConfigError, WeightsError
from lambdapo_async.weights.state import State
from lambdapo_async.weights.tensor_file import BitTensor, TensorFile

FILE_BYTES = 2 * 1024**3
"""Bytes of tensors per file, and what is in memory beside the state; one larger tensor has a file of its own."""

_CONFIG_FILE = "config.json"
_INDEX = "model.safetensors.index.json"
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def check_target(target: Path) -> None:
    """Refuse to write over anything, or into a folder that is not there: ``ConfigError``."""
    if target.exists():
        raise ConfigError(f"{target} exists already: name a folder that does not")
    if not target.absolute().parent.is_dir():
        raise ConfigError(f"{target.absolute().parent} is no folder: create it first")


def write_hf_folder(
    target: Path, state: State, model_files: Mapping[str, bytes], *, file_bytes: int = FILE_BYTES
) -> None:
    """Write a folder that ``from_pretrained`` reads; ``target`` appears complete or not at all.

    Args:
        target: must not exist, its parent must.
        model_files: file name -> content, without weights.
        file_bytes: bound of one file's tensors.

    Raises:
        ConfigError: ``target`` cannot be written.
        WeightsError: a model file's name is no plain one, or ``config.json`` is none.
        OSError: the disk refused.
    """
    check_target(target)
    for name in model_files:
        # Whoever may write to Redis must not write anywhere on this machine.
        if not name or Path(name).name != name or name.startswith(".") or not name.isprintable():
            raise WeightsError(f"the run has a model file {name!r:.200}, which is no plain file name: do not trust it")
    partial = Path(tempfile.mkdtemp(prefix=f"partial-{target.name}-", dir=target.absolute().parent))
    try:
        for name, content in model_files.items():
            write_file(partial / name, _with_dtype(content, state) if name == _CONFIG_FILE else content)
        _write_weights(partial, state, file_bytes)
        partial.chmod(0o755)
        sync(partial)
        partial.rename(target)
    except (OSError, WeightsError):
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(target.absolute().parent)


def replace_hf_folder(target: Path, state: State, model_files: Mapping[str, bytes]) -> None:
    """As :func:`write_hf_folder`, in place of what an earlier call wrote."""
    fresh, stale = (target.with_name(f"{kind}-{target.name}") for kind in ("fresh", "stale"))
    for left_over in (fresh, stale):
        shutil.rmtree(left_over, ignore_errors=True)
    write_hf_folder(fresh, state, model_files)
    if target.exists():
        target.rename(stale)
    fresh.rename(target)
    sync(target.absolute().parent)
    shutil.rmtree(stale, ignore_errors=True)


def _with_dtype(config: bytes, state: State) -> bytes:
    """The config says what the weights are, or they would be loaded as something else."""
    try:
        fields = json.loads(config)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"the run's {_CONFIG_FILE} is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise WeightsError(f"the run's {_CONFIG_FILE} is no JSON object")
    dtypes = {tensor.dtype for tensor in state.tensors.values()}
    if len(dtypes) == 1:
        fields.pop("torch_dtype", None)
        fields["dtype"] = _DTYPES[dtypes.pop()]
    return json.dumps(fields, indent=2).encode()


def _write_weights(folder: Path, state: State, file_bytes: int) -> None:
    parts = list(_parts(state, file_bytes))
    if len(parts) == 1:
        write_file(folder / "model.safetensors", TensorFile(parts[0], {"format": "pt"}).to_bytes())
        return
    weight_map = {}
    for number, part in enumerate(parts, start=1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_file(folder / name, TensorFile(part, {"format": "pt"}).to_bytes())
        weight_map.update(dict.fromkeys(part, name))
    index = {"metadata": {"total_size": state.num_bytes}, "weight_map": weight_map}
    write_file(folder / _INDEX, json.dumps(index, indent=1).encode())


def _parts(state: State, file_bytes: int) -> Iterator[dict[str, BitTensor]]:
    part: dict[str, BitTensor] = {}
    num_bytes = 0
    for name, tensor in state.tensors.items():
        if part and num_bytes + tensor.bits.nbytes > file_bytes:
            yield part
            part, num_bytes = {}, 0
        part[name] = tensor
        num_bytes += tensor.bits.nbytes
    yield part
