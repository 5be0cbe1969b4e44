"""Weight versions as files: what they say of themselves, and which tensors say what."""

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Annotated, Final, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    NonNegativeInt,
    StringConstraints,
    ValidationError,
    model_validator,
)

from lambdapo_async.errors import WeightsError
from lambdapo_async.weights import delta as deltas
from lambdapo_async.weights.delta import Change, Delta, Encoding
from lambdapo_async.weights.gaps import GapAbs, GapStep
from lambdapo_async.weights.state import SEPARATOR, WEIGHT_TYPES, State
from lambdapo_async.weights.tensor_file import BitTensor, Payload, TensorFile, compress, read_tensor_file

FORMAT: Final = "weights-delta/1"

M = TypeVar("M", bound="Metadata")

_GAP_TYPES = ("U8", "U16")
_PARTS = {"gap": _GAP_TYPES, "step": ("I8",), "exc": ("I16",), "val": WEIGHT_TYPES}


def _parsed(value: object) -> object:
    return json.loads(value) if isinstance(value, str) else value


Checksum = Annotated[str, StringConstraints(pattern=r"^xxh3_128:[0-9a-f]{32}$")]


class Metadata(BaseModel):
    """What every file says of itself; all values are strings in the file, what does not apply is left out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["weights-delta/1"] = FORMAT
    kind: Literal["full", "delta"]
    run_id: str
    version: NonNegativeInt
    checksum: Checksum
    """Of the resulting state."""
    keyframe_version: NonNegativeInt
    """Newest full version at or before this one."""
    numel: NonNegativeInt
    """Elements of the resulting state."""

    def to_strings(self) -> dict[str, str]:
        """As it stands in the file."""
        fields = self.model_dump(exclude_none=True)
        return {key: json.dumps(value) if key == "removed" else str(value) for key, value in fields.items()}

    def check_identity(self, *, run_id: str, version: int) -> None:
        """``WeightsError`` unless this is the file that was asked for."""
        if (self.run_id, self.version) != (run_id, version):
            raise WeightsError(
                f"the weights are version {self.version} of run {self.run_id!r:.100}, expected {version} of {run_id!r}"
            )


class FullMetadata(Metadata):
    """What a whole version says of itself."""

    kind: Literal["full"]


class DeltaMetadata(Metadata):
    """What a delta says of itself."""

    kind: Literal["delta"]
    base_version: NonNegativeInt
    """The version it was made from."""
    base_min: NonNegativeInt | None = None
    """Union files only: any base in [base_min, version) will do."""
    base_checksum: Checksum
    """Of version ``base_version``."""
    encoding: Encoding
    changed: NonNegativeInt
    """Elements that differ from version ``base_version``; of a union, that were touched since."""
    removed: Annotated[tuple[str, ...], BeforeValidator(_parsed)]
    """Tensors that are no longer there; a JSON list in the file."""

    @model_validator(mode="after")
    def _covers_bases(self) -> Self:
        if self.base_version >= self.version:
            raise ValueError(f"version {self.version} cannot come from {self.base_version}")
        if self.base_min is not None and self.encoding != "gap-abs":
            raise ValueError(f"{self.encoding} cannot be applied to any base in [{self.base_min}, {self.version})")
        return self


@dataclass(frozen=True, slots=True)
class DeltaFile:
    """One delta and where it leads from and to."""

    metadata: DeltaMetadata
    delta: Delta

    def to_bytes(self) -> bytes:
        """The whole file, compressed."""
        tensors: dict[str, BitTensor] = {}
        for name, change in self.delta.changes.items():
            tensors.update(_parts_of(name, change))
        return compress(TensorFile(tensors, self.metadata.to_strings()).to_bytes())

    def check_base(self, state: State, pool: Executor) -> None:
        """``WeightsError`` unless this may be applied to the version that ``state`` is."""
        metadata, version = self.metadata, state.version
        if metadata.base_min is None and version != metadata.base_version:
            raise WeightsError(f"version {metadata.version} changes {metadata.base_version}, the state is {version}")
        if metadata.base_min is not None and not metadata.base_min <= version < metadata.version:
            covered = f"[{metadata.base_min}, {metadata.version})"
            raise WeightsError(f"version {metadata.version} changes any of {covered}, the state is {version}")
        if version == metadata.base_version and (found := state.checksum(pool)) != metadata.base_checksum:
            raise WeightsError(f"version {version} is {found} here, {metadata.base_checksum} was changed")

    def apply_to(self, state: State, *, run_id: str, version: int, pool: Executor) -> None:
        """Make ``state`` version ``version`` of run ``run_id``, in place; whole, or not at all (see ``delta.apply``).

        Raises:
            WeightsError: another run, version or base, or a delta that does not fit; ``state`` is unchanged.
        """
        self.metadata.check_identity(run_id=run_id, version=version)
        self.check_base(state, pool)
        numel = self.delta.numel_after(state)
        if numel != self.metadata.numel:
            raise WeightsError(f"version {version} would have {numel} elements instead of {self.metadata.numel}")
        deltas.apply(self.delta, state, version=version, checksum=self.metadata.checksum, pool=pool)


def make_delta(old: State, new: State, *, run_id: str, keyframe_version: int, pool: Executor) -> DeltaFile:
    """The file that leads from ``old`` to ``new``; it shares memory with ``new`` where tensors are replaced whole."""
    delta = deltas.difference(old, new, pool)
    metadata = DeltaMetadata(
        kind="delta",
        run_id=run_id,
        version=new.version,
        checksum=new.checksum(pool),
        keyframe_version=keyframe_version,
        numel=new.numel,
        base_version=old.version,
        base_checksum=old.checksum(pool),
        encoding=delta.encoding,
        changed=delta.changed,
        removed=delta.removed,
    )
    return DeltaFile(metadata, delta)


def read_delta(payload: Payload, *, max_bytes: int) -> DeltaFile:
    """Parse and validate a delta as far as that is possible without its base.

    Args:
        payload: the file, compressed or plain.
        max_bytes: largest size it may have when decompressed; our own are no larger than the resulting state plus
            ``MAX_HEADER_BYTES``.

    Raises:
        WeightsError: it is damaged, or no delta.
    """
    file = read_tensor_file(payload, max_bytes=max_bytes)
    metadata = _metadata(DeltaMetadata, file)
    return DeltaFile(
        metadata,
        Delta(
            encoding=metadata.encoding,
            changes=dict(_changes(file.tensors, metadata.encoding)),
            removed=metadata.removed,
            changed=metadata.changed,
        ),
    )


def write_full(state: State, *, run_id: str, pool: Executor) -> bytes:
    """The plain file of a whole version; ``compress`` it for the wire."""
    metadata = FullMetadata(
        kind="full",
        run_id=run_id,
        version=state.version,
        checksum=state.checksum(pool),
        keyframe_version=state.version,
        numel=state.numel,
    )
    return TensorFile(state.tensors, metadata.to_strings()).to_bytes()


def read_full(payload: Payload, *, run_id: str, version: int, max_bytes: int, pool: Executor) -> State:
    """Version ``version`` of run ``run_id``, every bit of it proven; in memory of its own, writable.

    Raises:
        WeightsError: it is damaged, larger than ``max_bytes`` when decompressed, or of another run, version or kind.
    """
    file = read_tensor_file(payload, max_bytes=max_bytes)
    metadata = _metadata(FullMetadata, file)
    metadata.check_identity(run_id=run_id, version=version)
    state = State(version, {name: tensor.copy() for name, tensor in file.tensors.items()})
    found = state.checksum(pool)
    if (found, state.numel) != (metadata.checksum, metadata.numel):
        raise WeightsError(
            f"version {version} is {found} with {state.numel} elements, "
            f"its metadata say {metadata.checksum} with {metadata.numel}"
        )
    return state


def _metadata(model: type[M], file: TensorFile) -> M:
    try:
        return model.model_validate(file.metadata)
    except (ValidationError, RecursionError) as error:
        raise WeightsError(f"metadata {sorted(file.metadata)!s:.300} are not of {FORMAT}: {error!s:.300}") from error


def _parts_of(name: str, change: Change) -> Iterator[tuple[str, BitTensor]]:
    """How a change stands in the file."""
    if isinstance(change, BitTensor):
        yield name, change
        return
    num = (change.gap.size,)
    yield f"{name}{SEPARATOR}gap", BitTensor(_GAP_TYPES[change.gap.itemsize - 1], num, change.gap)
    if isinstance(change, GapAbs):
        yield f"{name}{SEPARATOR}val", change.val
        return
    yield f"{name}{SEPARATOR}step", BitTensor("I8", num, change.step)
    if change.exc.size:
        yield f"{name}{SEPARATOR}exc", BitTensor("I16", (change.exc.size,), change.exc)


def _changes(tensors: Mapping[str, BitTensor], encoding: Encoding) -> Iterator[tuple[str, Change]]:
    """The change of every tensor in the file."""
    parts: dict[str, dict[str, BitTensor]] = {}
    for key, tensor in tensors.items():
        name, separator, part = key.partition(SEPARATOR)
        if not separator and tensor.dtype not in WEIGHT_TYPES:
            raise WeightsError(f"{name!r:.200} is {tensor.dtype}; weights are one of {', '.join(WEIGHT_TYPES)}")
        if separator and (tensor.dtype not in _PARTS.get(part, ()) or len(tensor.shape) != 1):
            raise WeightsError(f"{key!r:.200} {tensor.shape} of type {tensor.dtype} is no part of a delta")
        parts.setdefault(name, {})[part] = tensor
    for name, found in parts.items():
        yield name, _change_of(name, found, encoding)


def _change_of(name: str, parts: Mapping[str, BitTensor], encoding: Encoding) -> Change:
    match sorted(parts):
        case [""]:
            return parts[""]
        case ["gap", "val"]:
            return GapAbs(parts["gap"].bits, parts["val"])
        case ["gap", "step"] | ["exc", "gap", "step"] if encoding == "gap-step":
            exc = parts["exc"].bits if "exc" in parts else parts["step"].bits[:0].astype("<i2")
            return GapStep(parts["gap"].bits, parts["step"].bits, exc)
    raise WeightsError(f"{name!r:.200} has the parts {sorted(parts)}, which are no change in a {encoding} delta")
