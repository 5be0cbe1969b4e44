import pytest
import torch

from learner.flops import ModelFlops, peak_flops, utilisation
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


def test_frozen_matrices_need_no_gradient_of_their_own() -> None:
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.0" in name)
    flops = ModelFlops.of(model)
    assert (flops.body, flops.trained_body, flops.trained_head) == (BODY, BODY / LAYERS, 0)


def test_peaks_and_utilisation() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("GeForce 256") is None
    assert utilisation(1.0, 1.0, torch.device("cpu")) is None
