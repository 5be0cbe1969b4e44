"""Float32 weights as the safetensors files of a Hugging Face folder, written one file after the other."""

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

FILE_BYTES = 2 * 1024**3
"""Bytes of tensors per file, and what is in memory at once; one larger tensor has a file of its own."""

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], *, file_bytes: int = FILE_BYTES) -> None:
    """Write ``model.safetensors``, or numbered files and their index, that ``from_pretrained`` reads.

    Args:
        folder: exists.
        tensors: Hugging Face name and whole CPU tensor, asked for one by one; none, and nothing is written (on
            ranks other than 0, see :func:`learner.sharding.full_tensors`).
        file_bytes: bound of a file's tensors.
    """
    parts: list[list[str]] = []
    held: dict[str, Tensor] = {}
    num_held = num_bytes = 0
    for name, tensor in tensors:
        if held and num_held + tensor.nbytes > file_bytes:
            parts.append(_write_part(folder, len(parts), held))
            held, num_held = {}, 0
        held[name] = tensor.contiguous()
        num_held += tensor.nbytes
        num_bytes += tensor.nbytes
    if held:
        parts.append(_write_part(folder, len(parts), held))
    if parts:
        _name_parts(folder, parts, num_bytes)


def _write_part(folder: Path, index: int, tensors: dict[str, Tensor]) -> list[str]:
    save_file(tensors, _part(folder, index), metadata={"format": "pt"})
    return list(tensors)


def _part(folder: Path, index: int) -> Path:
    return folder / f"part-{index}"


def _name_parts(folder: Path, parts: list[list[str]], num_bytes: int) -> None:
    """Names say how many files there are, which is known only now."""
    if len(parts) == 1:
        _part(folder, 0).rename(folder / _SINGLE)
        return
    weight_map = {}
    for index, names in enumerate(parts):
        file_name = f"model-{index + 1:05d}-of-{len(parts):05d}.safetensors"
        _part(folder, index).rename(folder / file_name)
        weight_map.update(dict.fromkeys(names, file_name))
    content = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    (folder / _INDEX).write_text(json.dumps(content, indent=1))
