import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor

from lambdapo_async.durable import WAY_OUT
from lambdapo_async.errors import CheckpointError
from learner.moments import read_moments, write_moments
from learner.parallel import ALONE, Ranks
from learner.sharding import full_tensors
from tests.ranks import run_ranks

SHAPES = {"embed": (61, 4), "norm": (3,), "bias": (1,)}
"""Over three ranks the first is sliced unevenly, and the last leaves two ranks with nothing."""


def moments(ranks: Ranks) -> dict[str, Tensor]:
    """As AdamW keeps them: two of each parameter's shape, and a count without dimensions."""
    found = {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        whole = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
        found[f"exp_avg:{name}"] = sliced(whole + 1000 * number, ranks)
        found[f"exp_avg_sq:{name}"] = sliced(whole - 1000 * number, ranks)
        found[f"step:{name}"] = torch.tensor(7.0 + number)
    return found


def sliced(whole: Tensor, ranks: Ranks) -> Tensor:
    return whole if ranks.mesh is None else distribute_tensor(whole, ranks.mesh, [Shard(0)])


def write(ranks: Ranks, folder: Path, file_bytes: int) -> None:
    write_moments(folder, moments(ranks), ranks, file_bytes=file_bytes)


def read(ranks: Ranks, folder: Path) -> dict[str, Tensor]:
    parameters = {name: sliced(torch.zeros(shape), ranks) for name, shape in SHAPES.items()}
    return dict(full_tensors(read_moments(folder, parameters, ranks).items(), ranks))


@pytest.mark.parametrize(("writers", "readers"), [(3, 1), (1, 2), (2, 3)])
def test_any_number_of_ranks_reads_what_any_other_wrote(tmp_path: Path, writers: int, readers: int) -> None:
    folder = tmp_path / "optimizer"
    if writers == 1:
        write(ALONE, folder, 2**30)
    else:
        run_ranks(tmp_path, writers, write, folder, 512)
        assert len(list(folder.iterdir())) == 2 * writers, "a bound of each rank's files, not of all ranks' together"
    found = read(ALONE, folder) if readers == 1 else run_ranks(tmp_path, readers, read, folder)[0]
    torch.testing.assert_close(found, moments(ALONE), rtol=0, atol=0)


def test_files_are_bounded(tmp_path: Path) -> None:
    write(ALONE, tmp_path / "optimizer", 1024)
    files = sorted((tmp_path / "optimizer").iterdir())
    assert len(files) == 2
    assert all(sum(tensor.nbytes for tensor in load_file(path).values()) <= 1024 for path in files)
    torch.testing.assert_close(read(ALONE, tmp_path / "optimizer"), moments(ALONE), rtol=0, atol=0)


def test_nothing_is_written_before_the_first_update(tmp_path: Path) -> None:
    write_moments(tmp_path / "optimizer", {}, ALONE)
    assert not (tmp_path / "optimizer").exists()
    assert read_moments(tmp_path / "optimizer", {}, ALONE) == {}


def test_a_parameter_of_another_shape_is_refused(tmp_path: Path) -> None:
    write(ALONE, tmp_path, 2**30)
    with pytest.raises(CheckpointError, match=r"'exp_avg:norm' has shape \(3,\), its parameter \(4,\)"):
        read_moments(tmp_path, {"norm": torch.zeros(4)}, ALONE)


def test_a_disk_that_refuses_is_reported_by_every_rank(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder can be made here")
    with pytest.raises(CheckpointError, match=f"rank 0: .*; {re.escape(WAY_OUT)}"):
        write_moments(blocked / "optimizer", moments(ALONE), ALONE)
