"""What the optimizer remembers, on disk: every rank writes its slices, any number of ranks reads them.

torch.distributed.checkpoint does the slicing, with safetensors as its format: its usual one pickles.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from lambdapo_async.durable import WAY_OUT
from lambdapo_async.errors import CheckpointError
from learner.parallel import Ranks
from learner.weight_files import FILE_BYTES

_SCALAR = "scalar/"
"""Before the name of a tensor without dimensions, which is stored as [1]: the format cannot slice it."""


def write_moments(folder: Path, moments: Mapping[str, Tensor], ranks: Ranks, *, file_bytes: int = FILE_BYTES) -> None:
    """On all ranks: write ``moments``, fsynced; no moments, no folder.

    Args:
        folder: the same for all ranks, on storage that all see.
        moments: ``moment:parameter`` -> sliced (DTensor) or equal on all ranks; the same names everywhere.
        file_bytes: bound of a file, as a mean over the ranks, and about what one copies to the CPU at once.

    Raises:
        CheckpointError: on every rank, when one could not write.
    """
    if not moments:
        return
    stored = {_stored_name(name, moment): _stored(moment) for name, moment in moments.items()}
    writer = HuggingFaceStorageWriter(
        str(folder),
        fqn_to_index_mapping=_file_of(stored, file_bytes * ranks.world_size),
        save_distributed=True,
    )
    with _one_process_is_fine(), _naming_the_folder(folder, way_out=f"; {WAY_OUT}"):
        save(stored, storage_writer=writer, process_group=ranks.messages, no_dist=ranks.is_alone)


def read_moments(folder: Path, parameters: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """On all ranks: what :func:`write_moments` of any number of ranks wrote, sliced as ``parameters`` are.

    Raises:
        CheckpointError: it cannot be read, or a parameter has another shape.
    """
    if not folder.is_dir():
        return {}
    with _one_process_is_fine(), _naming_the_folder(folder):
        reader = HuggingFaceStorageReader(str(folder))
        stored = {
            name: _room(name, tuple(entry.size), entry.properties.dtype, parameters)
            for name, entry in reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)  # the format holds nothing else
        }
        load(stored, storage_reader=reader, process_group=ranks.messages, no_dist=ranks.is_alone)
    return {
        name.removeprefix(_SCALAR): tensor.reshape(()) if name.startswith(_SCALAR) else tensor
        for name, tensor in stored.items()
    }


def _stored_name(name: str, moment: Tensor) -> str:
    return name if moment.ndim else _SCALAR + name


def _stored(moment: Tensor) -> Tensor:
    return moment if moment.ndim else moment.reshape(1)


def _file_of(stored: Mapping[str, Tensor], most_bytes: int) -> dict[str, int]:
    """Name -> number of its file, from 1, such that no file has more than ``most_bytes`` over all ranks."""
    numbers, number, held = {}, 1, 0
    for name, tensor in stored.items():
        num_bytes = tensor.numel() * tensor.element_size()
        if held and held + num_bytes > most_bytes:
            number, held = number + 1, 0
        numbers[name] = number
        held += num_bytes
    return numbers


def _room(name: str, shape: tuple[int, ...], dtype: torch.dtype, parameters: Mapping[str, Tensor]) -> Tensor:
    """Where a tensor is read into: sliced as its parameter; one of no known parameter whole, for others to judge."""
    parameter = parameters.get(name.partition(":")[2])
    if name.startswith(_SCALAR) or parameter is None:
        return torch.zeros(shape, dtype=dtype)
    if tuple(parameter.shape) != shape:
        raise CheckpointError(
            f"optimizer state is of another model: {name!r} has shape {shape}, its parameter {tuple(parameter.shape)}"
        )
    return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    """torch.distributed.checkpoint warns when there is no process group, asked for or not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


@contextmanager
def _naming_the_folder(folder: Path, *, way_out: str = "") -> Iterator[None]:
    try:
        yield
    except CheckpointException as error:
        problems = "; ".join(f"rank {rank}: {cause!s:.200}" for rank, (cause, _) in error.failures.items())
        raise CheckpointError(f"optimizer state {folder}: {problems}{way_out}") from error
