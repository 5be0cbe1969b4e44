from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from learner.weight_files import write_weights
from tests.tiny_models import Architecture, tiny_model

SMALL = 8192


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
@pytest.mark.parametrize("file_bytes", [SMALL, 2**30])
def test_a_folder_is_loaded_back_bit_for_bit(tmp_path: Path, architecture: Architecture, file_bytes: int) -> None:
    model = tiny_model(architecture)
    model.config.save_pretrained(tmp_path)
    write_weights(tmp_path, ((name, p.detach()) for name, p in model.named_parameters()), file_bytes=file_bytes)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(dict(loaded.named_parameters()), dict(model.named_parameters()), rtol=0, atol=0)


def test_files_are_bounded_and_named_by_their_number(tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.full((1000,), float(number)) for number in range(5)}
    write_weights(tmp_path, tensors.items(), file_bytes=SMALL)
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "model.safetensors.index.json"]


def test_tensors_are_asked_for_one_file_at_a_time(tmp_path: Path) -> None:
    on_disk = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for number in range(5):
            on_disk.append(len(list(tmp_path.iterdir())))
            yield f"t{number}", torch.zeros(1000)

    write_weights(tmp_path, tensors(), file_bytes=SMALL)
    assert on_disk == [0, 0, 0, 1, 1]


def test_without_tensors_nothing_is_written(tmp_path: Path) -> None:
    write_weights(tmp_path, [])
    assert list(tmp_path.iterdir()) == []
