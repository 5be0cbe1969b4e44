"""What a safetensors file must look like before an engine may load it."""

import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lambdapo_async.errors import WeightsError

FLOAT_TYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """One tensor of a safetensors header."""

    dtype: str
    """safetensors' name of the type, for example ``BF16``."""
    shape: tuple[int, ...]


Layout = Mapping[str, TensorLayout]
"""Every tensor of a file by its Hugging Face name."""


def read_layout(path: Path) -> Layout:
    """The tensors that ``path`` holds.

    Raises:
        WeightsError: no file, no safetensors file, or a tensor that is not floating point.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            layout = {name: TensorLayout(s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: not a readable safetensors file: {error}") from error
    wrong = [f"{name} is {tensor.dtype}" for name, tensor in layout.items() if tensor.dtype not in FLOAT_TYPES]
    if wrong:
        raise WeightsError(f"{path}: {_few(wrong)}; weights are one of {', '.join(FLOAT_TYPES)}")
    return layout


def check_same(path: Path, layout: Layout, expected: Layout) -> None:
    """``WeightsError`` unless both have the same names, shapes and types."""
    check_names(path, layout, expected.keys())
    wrong = [
        f"{name} is {found.dtype} {list(found.shape)}, expected {expected[name].dtype} {list(expected[name].shape)}"
        for name, found in layout.items()
        if found != expected[name]
    ]
    if wrong:
        raise WeightsError(f"{path}: {_few(wrong)}")


def check_names(path: Path, layout: Layout, expected: Set[str]) -> None:
    """``WeightsError`` unless the file holds exactly the expected tensors."""
    missing, unknown = sorted(expected - layout.keys()), sorted(layout.keys() - expected)
    if missing or unknown:
        problems = [f"{len(missing)} tensors missing: {_few(missing)}"] if missing else []
        problems += [f"{len(unknown)} tensors unknown to this model: {_few(unknown)}"] if unknown else []
        raise WeightsError(f"{path}: {'; '.join(problems)}")


def check_finite(path: Path, names: Iterable[str]) -> None:
    """``WeightsError`` if a value of these tensors is NaN or infinite; reads them once, without copying."""
    with safe_open(path, framework="pt") as file:
        for name in names:
            tensor = file.get_tensor(name)
            if tensor.numel() == 0:
                continue
            # NaN and infinities come out at the ends; isfinite().all() takes 33 times as long.
            low, high = torch.aminmax(tensor)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise WeightsError(f"{path}: {name} is not finite: values in [{low.item()}, {high.item()}]")


def layer_of(name: str) -> str:
    """What must be loaded whole: ``model.layers.3`` of ``model.layers.3.mlp.up_proj.weight``, else the tensor itself.

    Engines fuse tensors of one layer (query, key and value; gate and up; experts), never of two, and a fused tensor of
    which only a part is loaded has garbage for the rest.
    """
    numbered = re.match(r".*?\.\d+(?=\.)", name)
    return numbered[0] if numbered else name


def in_layers_of(changed: Set[str], names: Iterable[str]) -> list[str]:
    """Those of ``names`` that share a layer with a changed one, in their order."""
    layers = {layer_of(name) for name in changed}
    return [name for name in names if layer_of(name) in layers]


def _few(items: list[str]) -> str:
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")
