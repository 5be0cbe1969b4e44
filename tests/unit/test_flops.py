import pytest
import torch
from transformers import AriaTextConfig, AutoModelForCausalLM, Qwen2Config, Qwen3MoeConfig

from learner.flops import ModelFlops, expert_share, peak_flops, utilisation
from tests.tiny_models import SIZES, VOCAB, micro_batch, tiny_model

E, INNER, LAYERS = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["num_hidden_layers"]
QUERY, KEY = 4 * 8, 2 * 8
BODY = LAYERS * (E * (QUERY + 2 * KEY) + QUERY * E + 3 * E * INNER)
LENGTHS = (9, 6, 12)


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_the_count_is_the_one_by_hand(architecture) -> None:
    batch = micro_batch(LENGTHS, prompt=2)
    tokens, loss_tokens = sum(LENGTHS), sum(LENGTHS) - 2 * len(LENGTHS)
    # 2 products (scores, mixture), 2 operations each, 3 times (forward, two gradients), over half of the square
    attention = LAYERS * QUERY * sum(length**2 * 2 * 2 * 3 / 2 for length in LENGTHS)
    expected = 6 * BODY * tokens + 6 * E * VOCAB * loss_tokens + attention
    assert ModelFlops.of(tiny_model(architecture)).training(batch) == expected


def test_heads_without_a_size_of_their_own_share_the_hidden_size() -> None:
    config = Qwen2Config(**{key: size for key, size in SIZES.items() if key != "head_dim"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert "head_dim" not in config.to_dict()
    assert ModelFlops.of(model).attention == LAYERS * E


def test_frozen_matrices_need_no_gradient_of_their_own() -> None:
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.0" in name)
    flops = ModelFlops.of(model)
    assert (flops.body, flops.trained_body, flops.trained_head) == (BODY, BODY / LAYERS, 0)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
        ("GeForce 256", None),
    ],
)
def test_a_device_has_the_peak_of_the_longest_name_that_is_its_own(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_a_cpu_has_no_utilisation() -> None:
    assert utilisation(1.0, 1.0, torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Qwen3MoeConfig, {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
        (AriaTextConfig, {"moe_num_experts": 8, "moe_topk": 2}),
    ],
)
def test_an_expert_counts_by_its_share_of_the_tokens_whatever_the_config_calls_it(kind, words) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(kind(**SIZES, **words))
    shares = {expert_share(model, name) for name, _ in model.named_parameters() if ".experts." in name}
    assert shares == {2 / 8}
    assert ModelFlops.of(model).body > 0
