import json
import struct
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from lambdapo_async.errors import ConfigError, UserError, WeightsError
from lambdapo_async.weights.hf_folder import write_hf_folder
from lambdapo_async.weights.history import WeightHistory
from lambdapo_async.weights.inspect import compare_states, layer_of, reconstruct, total_change, verify
from lambdapo_async.weights.state import State
from tests.tiny_models import tiny_model
from tests.weight_history import MODEL_FILES, NAMES, MemoryStore, full_file, published, step_file, versions
from tests.weight_states import POOL, RUN, as_reference, state_of, tensor_of


def history_of(store: MemoryStore) -> WeightHistory:
    return WeightHistory(store, run_id=RUN, pool=POOL)


@pytest.fixture
def states() -> list[State]:
    return versions(8)


@pytest.fixture
def store(states: list[State]) -> MemoryStore:
    store = MemoryStore()
    for files in published(states):
        store.add(*files)
    return store


def bf16(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0] >> 16


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.12.self_attn.q_proj.weight", "model.layers.12"),
        ("transformer.h.3.mlp.bias", "transformer.h.3"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("lm_head.weight", "lm_head"),
        ("norm.bias", "norm"),
    ],
)
def test_tensors_are_grouped_by_layer(name: str, layer: str) -> None:
    assert layer_of(name) == layer


def test_share_and_largest_change_by_layer() -> None:
    ones = [bf16(1.0)] * 4
    old = state_of(1, **{"layers.0.a": ones, "layers.0.b": ones, "norm.weight": ones, "gone": [1, 2]})
    new = state_of(
        2,
        **{
            "layers.0.a": [bf16(1.0), bf16(-2.0), bf16(1.0), bf16(1.5)],
            "layers.0.b": ones,
            "norm.weight": ones,
            "new": [1, 2, 3],
        },
    )
    layers = compare_states(old, new)
    assert list(layers) == ["layers.0", "norm", "new", "gone"]
    assert (layers["layers.0"].numel, layers["layers.0"].changed, layers["layers.0"].max_change) == (8, 2, 3.0)
    assert (layers["norm"].changed, layers["norm"].max_change) == (0, 0.0)
    assert (layers["new"].share, layers["gone"].share) == (1.0, 1.0)
    assert (total_change(layers).numel, total_change(layers).changed) == (17, 7)


@pytest.mark.parametrize(
    ("dtype", "before", "after"),
    [("F32", 0x3F800000, 0xC0000000), ("F16", 0x3C00, 0xC000), ("BF16", 0x3F80, 0xC000)],
)
def test_values_of_every_type(dtype: str, before: int, after: int) -> None:
    old, new = state_of(1, t=tensor_of([before], dtype)), state_of(2, t=tensor_of([after], dtype))
    assert compare_states(old, new)["t"].max_change == 3.0


def test_a_sign_of_zero_is_a_change_of_size_zero() -> None:
    layer = compare_states(state_of(1, t=[0x0000]), state_of(2, t=[0x8000]))["t"]
    assert (layer.changed, layer.max_change) == (1, 0.0)


def test_every_kept_version_comes_back_bit_by_bit(states: list[State], store: MemoryStore) -> None:
    history = history_of(store)
    assert history.versions() == list(range(8))
    for state in states:
        assert as_reference(reconstruct(history, state.version)) == as_reference(state)


def test_a_version_that_is_not_kept_is_the_users_mistake(store: MemoryStore) -> None:
    store.payloads = {file: payload for file, payload in store.payloads.items() if file.base_version != 1}
    with pytest.raises(UserError, match=r"version 2 .* these can: 0, 1, 3"):
        reconstruct(history_of(store), 2)


def test_whole_weights_verify_along_every_path(store: MemoryStore) -> None:
    found = verify(history_of(store))
    assert (found.problems, found.versions, found.num_files) == ([], list(range(8)), 10)
    assert found.num_steps == 7 + 3 + 6, "seven steps, and the unions to 3 and 6 from all versions before"


def test_a_flipped_bit_is_found(store: MemoryStore) -> None:
    store.corrupt(next(file for file in store.files() if file.base_version == 4))
    problems = verify(history_of(store)).problems
    assert any("5.step" in problem for problem in problems)


def test_two_ways_that_end_in_different_bits_are_found(states: list[State], store: MemoryStore) -> None:
    other = states[5].copy()
    other.version = 6
    step = next(file for file in store.files() if file.base_version == 5)
    del store.payloads[step]
    store.add(step_file(states[5], other))  # whole and honest about itself, but the union says otherwise
    assert any("others say" in problem for problem in verify(history_of(store)).problems)


def test_a_file_without_a_base_and_one_that_vanished(states: list[State]) -> None:
    store = MemoryStore()
    store.add(full_file(states[0]), step_file(states[0], states[1]), step_file(states[4], states[5]))
    history = history_of(store)
    assert "nothing leads to the base of version 5" in verify(history).problems
    store.payloads = {file: payload for file, payload in store.payloads.items() if file.base_version != 0}
    assert any("gone" in problem for problem in verify(history_of_listed(store, history)).problems)


def history_of_listed(store: MemoryStore, earlier: WeightHistory) -> WeightHistory:
    """As if the files had been listed before some of them were deleted."""
    history = history_of(store)
    history.files = earlier.files
    return history


def test_an_export_is_what_transformers_loads(tmp_path: Path) -> None:
    model = tiny_model()
    state = State.of_torch(3, {name: each.detach().bfloat16() for name, each in model.named_parameters()})
    config = model.config.to_json_string().encode()
    write_hf_folder(tmp_path / "out", state, {"config.json": config, "tokenizer.json": b"{}"}, file_bytes=20_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    found = State.of_torch(3, dict(loaded.named_parameters()))
    assert as_reference(found) == as_reference(state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_small_export_is_one_file(tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "out", versions(1)[0], MODEL_FILES)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(NAMES)
    assert json.loads((tmp_path / "out" / "config.json").read_bytes()) == {"model_type": "qwen3", "dtype": "bfloat16"}


def test_an_export_writes_nowhere_else(tmp_path: Path) -> None:
    for name in ("../x", ".hidden", "a/b", ""):
        with pytest.raises(WeightsError, match="no plain file name"):
            write_hf_folder(tmp_path / "out", versions(1)[0], {**MODEL_FILES, name: b""})
    with pytest.raises(ConfigError, match="exists already"):
        write_hf_folder(tmp_path, versions(1)[0], MODEL_FILES)
    with pytest.raises(WeightsError, match="no JSON"):
        write_hf_folder(tmp_path / "out", versions(1)[0], {"config.json": b"{"})
    assert not (tmp_path / "out").exists()
