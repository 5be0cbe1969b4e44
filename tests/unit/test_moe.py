"""Mixtures of experts of transformers train like any model."""

import math
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Glm4MoeConfig, MixtralConfig, PhimoeConfig, Qwen3MoeConfig, set_seed

from lambdapo_async.config.learner import LearnerConfig
from lambdapo_async.errors import ConfigError
from lambdapo_async.packing import MicroBatch
from lambdapo_async.rank_balance import filler
from lambdapo_async.weights.delta import difference
from lambdapo_async.weights.state import State
from learner.attention import select_attention
from learner.export import export_model
from learner.flops import ModelFlops
from learner.memory_plan import plan_memory, read_shape
from learner.policy import Policy
from learner.router_loss import balance_loss, expert_choices, expert_costs
from tests.tiny_models import SIZES, VOCAB, micro_batch, tiny_model_folder
from tests.unit.test_activations import BATCH, saved_bytes
from tests.weight_states import POOL

CPU = torch.device("cpu")
NUM_EXPERTS, TOP_K = 4, 2
CHOICE_BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
IDS = torch.arange(24) * 7 % VOCAB
DOCUMENTS = (((9,), IDS[:9]), ((15,), IDS[9:]), ((9, 15), IDS))
EXPERT = re.compile(r"(layers\.\d+\.\w+\.experts\.\d+)\.")
CONFIGS = {
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SIZES, num_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K, moe_intermediate_size=24
    ),
    "mixtral": lambda: MixtralConfig(
        **{**SIZES, "intermediate_size": 24}, num_local_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K
    ),
}


@pytest.fixture(params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    set_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param](), attn_implementation=select_attention(CPU))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(folder: Path, **changes: object) -> Policy:
    config = LearnerConfig.model_validate({"lr": 1e-3, **changes})
    return Policy.load(folder, revision=None, config=config, temperature=1.0, device=CPU)


def gradient_moments(policy: Policy, scale: float = 0.05) -> dict[str, torch.Tensor]:
    policy.backward(BATCH, lambda logprobs_T, _: -logprobs_T.sum() * scale)
    policy.step()
    return {name: tensor for name, tensor in policy.optimizer_state().items() if name.startswith("exp_avg:")}


def test_gradient_reaches_routers_and_every_expert(folder: Path) -> None:
    moments = gradient_moments(load(folder))
    routers = [tensor for name, tensor in moments.items() if "mlp.gate.weight" in name]
    experts = [tensor for name, tensor in moments.items() if ".experts." in name]
    assert (len(routers), len(experts)) == (2, 4)
    for stacked in (*routers, *experts):
        assert (stacked.flatten(1).abs().sum(dim=1) > 0).all()


def test_checkpointing_changes_no_number(folder: Path) -> None:
    plain, saving = (load(folder, router_aux_coef=0.1, activation_checkpointing=is_on) for is_on in (False, True))
    assert balanced(saving, [BATCH]) == pytest.approx(balanced(plain, [BATCH]), rel=1e-5)
    torch.testing.assert_close(gradient_moments(saving), gradient_moments(plain))


def test_published_names_and_values_are_those_of_the_file(folder: Path) -> None:
    saved = load_file(folder / "model.safetensors")
    published = dict(load(folder).named_weights())
    assert any("experts.3." in name for name in published)
    torch.testing.assert_close(published, saved, rtol=0, atol=0)


def test_experts_without_tokens_are_not_in_the_delta(folder: Path) -> None:
    policy = load(folder)
    old = State.of_torch(0, dict(policy.published()))
    policy.backward(micro_batch((2,), prompt=1), lambda logprobs_T, _: -logprobs_T.sum())  # one token predicts
    policy.step()
    delta = difference(old, State.of_torch(1, dict(policy.published())), POOL)
    tensors = Counter(expert[1] for name in delta.changes if (expert := EXPERT.search(name)))
    assert list(tensors.values()) == [3] * 2 * TOP_K, "three matrices of each expert asked, in two layers"
    assert sum("experts" in name for name in old.tensors) == 3 * 2 * NUM_EXPERTS


def test_experts_count_by_the_tokens_they_see(folder: Path) -> None:
    model = read_shape(folder)
    dense = 2 * (32 * (32 + 2 * 16) + 32 * 32)
    routers = 2 * NUM_EXPERTS * 32
    assert ModelFlops.of(model).body == dense + routers + 2 * TOP_K * 3 * 32 * 24


def test_activations_are_within_the_plan(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=select_attention(CPU))
    plan = plan_memory(model, LearnerConfig(micro_batch_tokens=len(BATCH.input_ids_T)), "cpu")
    assert 0.7 * plan.activations < saved_bytes(model.eval()) < plan.activations + plan.logits


def test_balance_loss_is_the_papers() -> None:
    logits_TX = torch.randn(9, NUM_EXPERTS, generator=torch.Generator().manual_seed(1)).tolist()
    rows = [0, 2, 3, 3, 5, 6, 8]  # a prompt's last token predicts the first of several completions
    share, probability = [0.0] * NUM_EXPERTS, [0.0] * NUM_EXPERTS
    for row in (logits_TX[number] for number in rows):
        total = sum(torch.tensor(row).exp().tolist())
        for expert in sorted(range(NUM_EXPERTS), key=lambda x: -row[x])[:TOP_K]:
            share[expert] += 1 / (7 * TOP_K)
        for expert in range(NUM_EXPERTS):
            probability[expert] += float(torch.tensor(row[expert]).exp()) / total / 7
    expected = NUM_EXPERTS * sum(f * p for f, p in zip(share, probability, strict=True))
    layers, rows_S = [torch.tensor(logits_TX)] * 2, torch.tensor(rows)
    costs_RX = expert_costs(expert_choices(layers, rows_S, top_k=TOP_K), top_k=TOP_K)
    parts = [balance_loss(layers, part_S, costs_RX) for part_S in (rows_S[:3], rows_S[3:], rows_S[:0])]
    assert float(sum(parts)) == pytest.approx(expected, rel=1e-5)
    even = expert_costs(torch.full((3, 4), 2.0), top_k=4)
    assert float(balance_loss([torch.zeros(2, 4)] * 3, torch.arange(2), even)) == pytest.approx(1.0)


def balanced(policy: Policy, batches: list[MicroBatch]) -> float:
    """Gradient norm of the balance of one update alone."""
    costs_RX = policy.expert_costs(batches)
    for batch in batches:
        policy.backward(batch, lambda logprobs_T, _: logprobs_T.sum() * 0, costs_RX)
    return policy.step()


def test_balance_loss_of_two_layers_that_ask_one_expert_alone() -> None:
    """Every token asks expert 0 or 1 of 4, whose probability is p, in bfloat16 as a model on a GPU says it."""
    first, second = torch.tensor([[3.0, 0, 0, 0]] * 5), torch.tensor([[0, 1.0, 0, 0]] * 5)
    p = [math.exp(logit) / (math.exp(logit) + 3) for logit in (3.0, 1.0)]
    layers, rows_S = [first.bfloat16(), second.bfloat16()], torch.arange(5)
    costs_RX = expert_costs(expert_choices(layers, rows_S, top_k=1), top_k=1)
    assert float(balance_loss(layers, rows_S, costs_RX)) == pytest.approx(4 * (p[0] + p[1]) / 2, rel=1e-6)


def test_the_auxiliary_loss_alone_evens_the_routers_out(folder: Path) -> None:
    policy = load(folder, router_aux_coef=1.0, lr=1e-2)
    balanced(policy, [BATCH])
    moments = policy.optimizer_state()
    assert moments["exp_avg:model.layers.0.mlp.gate.weight"].abs().max() > 0
    plain = load(folder)
    assert plain.expert_costs([BATCH]) is None
    assert not gradient_moments(plain, scale=0.0)["exp_avg:model.layers.0.mlp.gate.weight"].any()


def test_packing_changes_no_balance(folder: Path) -> None:
    """Two documents together, apart, and with a rank's filler between them."""
    first, second, together = (micro_batch(lengths, ids=ids) for lengths, ids in DOCUMENTS)
    packings = ([together], [first, second], [second, filler(), first])
    norms = [balanced(load(folder, router_aux_coef=1.0, max_grad_norm=1e9), batches) for batches in packings]
    assert norms[1:] == pytest.approx(norms[:1] * 2, rel=1e-5)


def test_a_dense_model_has_no_routers_to_balance(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a mixture of experts"):
        load(tiny_model_folder(tmp_path), router_aux_coef=0.1)


def test_attention_takes_adapters_beside_experts(folder: Path) -> None:
    pytest.importorskip("peft")
    policy = load(folder, lora={"rank": 2})
    before = policy.logprobs(BATCH).sum()
    for _ in range(3):
        policy.backward(BATCH, lambda logprobs_T, _: -logprobs_T.sum() * 0.05)
        policy.step()
    assert policy.logprobs(BATCH).sum() > before
    assert set(dict(policy.named_weights())) == set(load_file(folder / "model.safetensors"))


@pytest.fixture
def partly_dense(tmp_path: Path) -> Path:
    """A dense layer before one of experts, which a float32 bias helps to choose, beside one that sees every token."""
    experts = {"n_routed_experts": NUM_EXPERTS, "num_experts_per_tok": TOP_K, "moe_intermediate_size": 24}
    model = AutoModelForCausalLM.from_config(Glm4MoeConfig(**SIZES, **experts, first_k_dense_replace=1, pad_token_id=0))
    model.get_buffer(CHOICE_BIAS).copy_(torch.rand(NUM_EXPERTS))
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_what_is_computed_in_float32_is_published_and_exported_in_float32(
    partly_dense: Path, tmp_path: Path, lora: dict[str, int] | None
) -> None:
    """Rounded, the bias chooses other experts for an actor than for the learner."""
    if lora:
        pytest.importorskip("peft")
    policy = load(partly_dense, lora=lora)
    policy.save_model(tmp_path / "saved")
    export_model(tmp_path / "saved", tmp_path / "exported", dtype=torch.bfloat16)
    expected = load_file(partly_dense / "model.safetensors")[CHOICE_BIAS]
    assert not torch.equal(expected, expected.bfloat16().float())
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    for found in (dict(policy.published()), exported):
        torch.testing.assert_close(found[CHOICE_BIAS], expected, rtol=0, atol=0)
        assert found["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16


def test_dense_layers_take_adapters_and_experts_of_the_same_names_none(partly_dense: Path) -> None:
    """peft maps the names of dense layers onto stacked experts, whose adapters nobody would merge or publish."""
    pytest.importorskip("peft")
    policy = load(partly_dense, lora={"rank": 2, "target_modules": ["gate_proj"]})
    gradient_moments(policy)
    layers = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name, _ in policy.named_adapter()}
    assert layers == {"model.layers.0.mlp.gate_proj", "model.layers.1.mlp.shared_experts.gate_proj"}
    assert set(dict(policy.named_weights())) == set(load_file(partly_dense / "model.safetensors"))


def test_a_router_that_is_a_linear_layer_takes_no_adapter(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    sizes = {name: size for name, size in SIZES.items() if name != "head_dim"}
    config = PhimoeConfig(**sizes, num_local_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K, pad_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    policy = load(tmp_path, lora={"rank": 2})
    assert not any("router" in name for name, _ in policy.named_adapter())
    assert gradient_moments(policy)
