import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lambdapo_async.config.learner import LearnerConfig, LoraConfig
from lambdapo_async.errors import CheckpointError, ConfigError, WeightsError
from lambdapo_async.weights.adapter import merged_state
from lambdapo_async.weights.delta import difference
from lambdapo_async.weights.state import State
from learner.lora import add_adapters, merge_folder
from learner.policy import Policy
from tests.tiny_models import micro_batch, tiny_model, tiny_model_folder

pytest.importorskip("peft")

BATCH = micro_batch((9, 6, 12))
LORA = {"rank": 2, "alpha": 8.0, "target_modules": ["q_proj", "down_proj"]}


def load(folder: Path, lora: dict[str, object] | None = LORA, **changes: object) -> Policy:
    config = LearnerConfig.model_validate({"lr": 1e-2, "lora": lora, **changes})
    return Policy.load(folder, revision=None, config=config, temperature=1.0, device=torch.device("cpu"))


def train(policy: Policy, num_updates: int = 3) -> Policy:
    for _ in range(num_updates):
        policy.backward(BATCH, lambda logprobs_T, _: -logprobs_T.sum() / 20)
        policy.step()
    return policy


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(1, 12)[None]).logits


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_model_folder(tmp_path / "model")


def test_adapters_alone_are_trained_and_start_as_the_model(folder: Path) -> None:
    plain, policy = load(folder, None), load(folder)
    torch.testing.assert_close(policy.logprobs(BATCH), plain.logprobs(BATCH))
    before = policy.logprobs(BATCH).sum()
    train(policy)
    assert policy.logprobs(BATCH).sum() > before
    # rank x (in + out) of q_proj (32 -> 32) and down_proj (48 -> 32), in 2 layers
    assert policy.num_parameters == 2 * 2 * (64 + 80)
    assert all(".lora_" in name for name in policy.optimizer_state())


def test_what_is_published_is_the_frozen_model_and_the_adapters(folder: Path) -> None:
    policy = train(load(folder))
    first = dict(policy.published())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    frozen = {name: tensor.detach().bfloat16() for name, tensor in model.named_parameters()}
    torch.testing.assert_close({name: first[name] for name in frozen}, frozen, rtol=0, atol=0)
    assert first.keys() - frozen.keys() == dict(policy.named_adapter()).keys()
    train(policy)
    second = dict(policy.published())
    assert all(second[name].data_ptr() == first[name].data_ptr() for name in frozen)
    assert all(not torch.equal(second[name], first[name]) for name in first.keys() - frozen.keys())


def test_only_adapters_travel_and_the_model_is_not_compared_again(folder: Path, pool: ThreadPoolExecutor) -> None:
    policy = train(load(folder))
    old = State.of_torch(0, dict(policy.published()))
    old.checksum(pool)
    train(policy)
    new = State.of_torch(1, dict(policy.published()))
    delta = difference(old, new, pool)
    assert delta.changes == {name: new.tensors[name] for name, _ in policy.named_adapter()}  # whole, not as gaps
    assert new._digests.keys() == new.tensors.keys()  # the model's passed on, the adapters' computed
    assert new.checksum(pool) == State.of_torch(1, dict(policy.published())).checksum(pool)


def test_an_exported_version_is_the_merged_model(folder: Path) -> None:
    policy = train(load(folder))
    merged = merged_state(State.of_torch(3, dict(policy.published())), LoraConfig.model_validate(LORA))
    expected = {name: tensor.bfloat16().float() for name, tensor in policy.named_weights()}
    assert merged.tensors.keys() == expected.keys()
    for name, tensor in expected.items():  # adapters went out as bfloat16, so the last bit may differ
        found = torch.from_numpy(merged.tensors[name].bits.view("<i2")).view(torch.bfloat16)
        torch.testing.assert_close(found.float().view(tensor.shape), tensor, rtol=2**-7, atol=1e-4)


def test_half_an_adapter_is_named(folder: Path) -> None:
    published = dict(load(folder).published())
    name = next(name for name in published if name.endswith(".lora_B.weight"))
    del published[name]
    with pytest.raises(WeightsError, match=r"of which a part is missing"):
        merged_state(State.of_torch(0, published), LoraConfig.model_validate(LORA))


def test_merged_weights_have_the_models_own_names(folder: Path) -> None:
    policy = train(load(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    start = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    published = dict(policy.named_weights())
    assert set(published) == set(start)
    changed = {name for name in start if not torch.equal(start[name], published[name])}
    assert changed == {
        f"model.layers.{i}.{part}.weight" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.down_proj")
    }
    model.load_state_dict(published, strict=False)
    model.save_pretrained(folder / "published")
    torch.testing.assert_close(load(folder / "published", None).logprobs(BATCH), policy.logprobs(BATCH))


def test_a_checkpoint_resumes_bit_for_bit_and_transformers_loads_it(folder: Path, tmp_path: Path) -> None:
    whole = train(load(folder), 2)
    whole.save_model(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("model*"))  # adapters only
    resumed = load(tmp_path / "saved")
    moments = {name: tensor.clone() for name, tensor in whole.optimizer_state().items()}
    resumed.load_optimizer_state(moments, num_updates=2, num_skipped=0)
    assert resumed.model_files == whole.model_files
    train(whole)
    train(resumed)
    torch.testing.assert_close(dict(resumed.named_adapter()), dict(whole.named_adapter()), rtol=0, atol=0)
    whole.save_model(tmp_path / "later")
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected.load_state_dict(dict(whole.named_weights()), strict=False)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "later", dtype=torch.float32)
    torch.testing.assert_close(logits(found), logits(expected))


def test_adapter_files_have_the_names_that_peft_and_vllm_read(folder: Path, tmp_path: Path) -> None:
    policy = load(folder)
    policy.save_model(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert saved["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"].shape == (2, 48)
    assert saved["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"].shape == (32, 2)
    torch.testing.assert_close(dict(policy.named_adapter()), saved, rtol=0, atol=0)
    settings = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (2, 8.0)
    assert settings["target_modules"] == ["down_proj", "q_proj"]
    assert Path(settings["base_model_name_or_path"]) == folder.resolve()


def test_without_names_every_linear_layer_but_the_output_layer_is_adapted() -> None:
    model = tiny_model("llama")
    add_adapters(model, LoraConfig(rank=1))
    adapted = {name.split(".lora_A")[0] for name, each in model.named_parameters() if ".lora_A." in name}
    assert len(adapted) == 2 * 7
    assert not any("lm_head" in name for name in adapted)


def test_a_target_that_is_no_linear_layer_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"names q_prj, but .* down_proj, .*q_proj"):
        load(folder, {"target_modules": ["q_prj"]})


def test_adapters_of_another_rank_or_without_lora_are_refused(folder: Path, tmp_path: Path) -> None:
    load(folder).save_model(tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"8 adapters differ .* \(2, 48\) saved, \(3, 48\) configured"):
        load(tmp_path / "saved", {**LORA, "rank": 3})
    with pytest.raises(ConfigError, match=r"set learner\.lora"):
        load(tmp_path / "saved", None)


def test_adapters_of_another_scale_are_refused(folder: Path, tmp_path: Path) -> None:
    load(folder).save_model(tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"trained with learner\.lora\.alpha = 8, .* another policy with 16"):
        load(tmp_path / "saved", {**LORA, "alpha": 16.0})


def test_adapters_of_another_model_are_not_merged(folder: Path, tmp_path: Path) -> None:
    load(folder).save_model(tmp_path / "saved")
    for changes, found in (({"intermediate_size": 40}, r"\(32, 40\)"), ({"num_hidden_layers": 1}, "None")):
        model = tiny_model(**changes)
        with pytest.raises(CheckpointError, match=rf"adapts .*down_proj.weight of shape \(32, 48\), which is {found}"):
            merge_folder(model, tmp_path / "saved")


def test_adapters_train_under_checkpointing_with_the_same_numbers(folder: Path) -> None:
    policies = []
    for is_on in (False, True):
        torch.manual_seed(3)  # of A
        policies.append(train(load(folder, activation_checkpointing=is_on, activation_offload=is_on)))
    plain, saving = (dict(policy.named_adapter()) for policy in policies)
    torch.testing.assert_close(saving, plain, rtol=0, atol=0)


def test_without_peft_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'lambdapo-async\[lora\]'"):
        add_adapters(tiny_model(), LoraConfig())


def test_a_model_that_moved_away_from_its_adapters_is_named(folder: Path, tmp_path: Path) -> None:
    load(folder).save_model(tmp_path / "saved")
    folder.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"saved holds LoRA adapters of the model .*, which must stay there"):
        load(tmp_path / "saved")


def test_a_model_that_was_replaced_under_its_adapters_is_named(folder: Path, tmp_path: Path) -> None:
    """Nothing but its numbers differs."""
    load(folder).save_model(tmp_path / "saved")
    tiny_model(seed=1).save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"saved holds LoRA adapters of weights that were in .*, which holds others"):
        load(tmp_path / "saved")
