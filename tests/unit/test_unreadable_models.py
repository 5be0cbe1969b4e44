"""Models that cannot be read: one error that says what is wrong."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import FalconConfig, GPTJConfig, MptConfig, PreTrainedConfig

from lambdapo_async.errors import ConfigError
from tests.tiny_models import tiny_model_folder
from tests.unit.test_policy import load


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_model_folder(tmp_path / "model")


def test_a_folder_that_holds_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"without config\.json"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        (GPTJConfig(n_layer=1, n_head=1, n_embd=8, rotary_dim=4), "does not support an attention implementation"),
        (MptConfig(n_layers=1, n_heads=1, d_model=8), "does not support an attention implementation"),
        (FalconConfig(num_hidden_layers=1, num_attention_heads=1, hidden_size=8), "no layers for the attention"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_an_architecture_without_the_attention_interface_is_named(
    folder: Path, shape: PreTrainedConfig, problem: str
) -> None:
    shape.save_pretrained(folder)
    with pytest.raises(ConfigError, match=problem):
        load(folder)


def test_damaged_weights_are_named(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"garbage" * 10)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load(folder)


def test_a_name_that_is_neither_folder_nor_repo_is_named() -> None:
    with pytest.raises(ConfigError, match=r"model\.path = 'no such model!': there is no such folder, and a repo id"):
        load(Path("no such model!"))


def test_weights_that_are_not_the_configs_are_named_with_their_shapes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(
        ConfigError, match=r"6 differ: model\.layers\.0\.mlp\.down_proj\.weight is \[32, 48\] .* \[32, 40\]"
    ):
        load(folder)


def test_missing_weights_are_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"model\.norm\.weight is missing"):
        load(folder)
