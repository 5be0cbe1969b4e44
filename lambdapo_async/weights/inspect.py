"""What a person wants to know of published weights: what changed, where, how much, and whether it all fits together."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lambdapo_async.errors import UserError, WeightsError
from lambdapo_async.weights.gaps import changed_positions
from lambdapo_async.weights.history import WeightHistory
from lambdapo_async.weights.state import State
from lambdapo_async.weights.tensor_file import BitTensor

_LAYER = re.compile(r"^(.*?\b(?:layers|h|blocks)\.\d+)\.")


class NoSuchVersionError(WeightsError, UserError):
    """Nothing in the store leads to that version."""


@dataclass(slots=True)
class LayerChange:
    """Two versions of one layer, or of one tensor that belongs to none."""

    numel: int = 0
    changed: int = 0
    """Elements whose bits differ; a tensor that came, went or has another type or shape differs in all of them."""
    max_change: float = 0.0
    """Largest absolute difference of two values; NaN if one of them is."""

    @property
    def share(self) -> float:
        """Changed elements per element."""
        return self.changed / max(1, self.numel)

    def add(self, before: BitTensor | None, after: BitTensor | None) -> None:
        """Count one tensor."""
        if before is None or after is None or not before.is_like(after):
            numel = max(tensor.bits.size for tensor in (before, after) if tensor is not None)
            self.numel += numel
            self.changed += numel
            self.max_change = float("nan")
            return
        self.numel += after.bits.size
        for at in changed_positions(before.bits, after.bits):
            self.changed += at.size
            change = np.abs(values_of(after, at) - values_of(before, at)).max()
            self.max_change = float(np.maximum(self.max_change, change))


@dataclass(slots=True)
class Verification:
    """What ``verify`` looked at and what was wrong."""

    num_files: int = 0
    num_bytes: int = 0
    num_steps: int = 0
    """Pairs of a file and a version that it was applied to."""
    versions: list[int] = field(default_factory=list)
    """That can be reconstructed."""
    problems: list[str] = field(default_factory=list)


def layer_of(name: str) -> str:
    """``model.layers.3`` of any of its tensors; the module of a tensor outside the layers."""
    match = _LAYER.match(name)
    return match[1] if match else name.removesuffix(".weight").removesuffix(".bias")


def values_of(tensor: BitTensor, at: NDArray[np.int64]) -> NDArray[np.float64]:
    """[n] float64 values at flat positions ``at``."""
    bits = tensor.bits[at]
    match tensor.dtype:
        case "BF16":
            return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        case "F16":
            return bits.view(np.float16).astype(np.float64)
    return bits.view(np.float32).astype(np.float64)


def compare_states(old: State, new: State, *, part_of: Callable[[str], str] = layer_of) -> dict[str, LayerChange]:
    """What changed in each part, in the order of ``new``, then what went.

    Args:
        part_of: name of a tensor -> the part it is counted in; ``str`` counts every tensor by itself.
    """
    parts: dict[str, LayerChange] = {}
    for name in (*new.tensors, *(old.tensors.keys() - new.tensors.keys())):
        parts.setdefault(part_of(name), LayerChange()).add(old.tensors.get(name), new.tensors.get(name))
    return parts


def total_change(layers: Mapping[str, LayerChange]) -> LayerChange:
    """All layers as one."""
    return LayerChange(
        numel=sum(layer.numel for layer in layers.values()),
        changed=sum(layer.changed for layer in layers.values()),
        max_change=float(np.max([layer.max_change for layer in layers.values()], initial=0.0)),
    )


def reconstruct(history: WeightHistory, version: int) -> State:
    """Version ``version`` with the fewest bytes, every bit of it proven.

    Raises:
        NoSuchVersionError: the files that are kept do not lead there.
        WeightsError: one of them is damaged, or was deleted meanwhile.
    """
    versions = history.versions()
    if version not in versions:
        kept = ", ".join(map(str, versions)) or "none"
        raise NoSuchVersionError(f"version {version} cannot be reconstructed from what is kept; these can: {kept}")
    return history.state(version)


def verify(history: WeightHistory) -> Verification:
    """Fetch every file and apply it to every version that it says it can be applied to.

    Each result is held against the checksum of its file, and all files of a version must name the same one. Versions
    are proven one by one from those before, so that all paths to a version agree when all last steps do.
    """
    found = Verification(num_files=len(history.files), num_bytes=sum(file.num_bytes for file in history.files))
    found.versions = history.versions()
    checksums: dict[int, str] = {}
    for version, checksum, name in history.claims(found.problems):
        if checksums.setdefault(version, checksum) != checksum:
            found.problems.append(f"{name} says version {version} is {checksum}, others say {checksums[version]}")
    unreachable = {file.version for file in history.files} - set(found.versions)
    found.problems += [f"nothing leads to the base of version {version}" for version in sorted(unreachable)]
    found.problems += _steps(history, found)
    return found


def _steps(history: WeightHistory, found: Verification) -> Iterator[str]:
    state: State | None = None
    for version in found.versions:
        try:
            state = history.state(version, since=state)
        except WeightsError as error:
            state = None
            yield f"version {version}: {error}"
            continue
        for file in history.leading_from(version):
            found.num_steps += 1
            try:
                history.apply(file, state.copy())
            except WeightsError as error:
                yield f"version {version} to {file.version}: {error}"
