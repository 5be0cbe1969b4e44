from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from lambdapo_async.config.learner import LearnerConfig
from lambdapo_async.errors import ConfigError
from learner.activations import enable_checkpointing, offload_to_host
from learner.attention import select_attention
from learner.logprobs import packed_logprobs
from learner.policy import Policy
from learner.projection import CHUNK_LOGITS, KEPT_LOGITS
from tests.products import Products
from tests.tiny_models import micro_batch, tiny_model, tiny_model_folder

BATCH = micro_batch((40, 25, 31))


def saved_bytes(model: PreTrainedModel) -> int:
    """What autograd keeps after a forward pass, parameters and shared storages counted once or not at all."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept.append(tensor)  # else its address would be taken again
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        packed_logprobs(model, BATCH, temperature=1.0)[0].sum()
    return sum(storages.values())


def test_checkpointing_keeps_less_with_every_module_but_the_layers_in_evaluation_mode() -> None:
    plain, model = tiny_model(), tiny_model()
    enable_checkpointing(model)
    assert saved_bytes(model) < saved_bytes(plain) / 2
    training = {type(module).__name__ for module in model.modules() if module.training}
    assert training == {"Qwen3DecoderLayer"}


class _Noisy(nn.Module):
    """A layer's part that listens to its layer's mode, as functional dropout in the layer itself does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._inner, self._layer = layer.mlp, [layer]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(self._inner(hidden), 0.1, self._layer[0].training)


def test_a_layer_that_drops_in_training_mode_is_refused() -> None:
    model = tiny_model()
    layer = model.model.layers[0]
    layer.mlp = _Noisy(layer)
    with pytest.raises(ConfigError, match="something else in training mode"):
        enable_checkpointing(model)


def test_dropout_inside_a_layer_stays_off() -> None:
    config = GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0.5)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=select_attention(torch.device("cpu")))
    enable_checkpointing(model.eval())
    with torch.no_grad():
        first, second = (packed_logprobs(model, BATCH, temperature=1.0)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_offload_copies_what_is_kept_and_leaves_parameters_where_they_are() -> None:
    weight = nn.Parameter(torch.ones(3, 3))
    hidden = torch.arange(3.0, requires_grad=True)
    doubled = hidden * 2
    with offload_to_host(nn.ParameterList([weight]), is_on=True):
        output = weight @ doubled
    # Behind autograd's back: a copy does not see it, what was left in place does.
    doubled.data.fill_(9.0)
    weight.data.fill_(5.0)
    output.sum().backward()
    torch.testing.assert_close(weight.grad, torch.tensor([0.0, 2.0, 4.0]).expand(3, 3))
    torch.testing.assert_close(hidden.grad, torch.full((3,), 2.0 * 3 * 5.0))


def test_logits_are_computed_again_where_layers_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk of the output layer is one product forward; of those backward one is its logits'."""
    folder = tiny_model_folder(tmp_path / "model")

    def products(num_chunks: int, *, is_checkpointed: bool) -> int:
        settings = LearnerConfig(activation_checkpointing=is_checkpointed)
        policy = Policy.load(folder, revision=None, config=settings, temperature=0.7, device=torch.device("cpu"))
        columns = -(-policy.vocab_size // num_chunks)
        monkeypatch.setitem(CHUNK_LOGITS, "cpu", columns * BATCH.num_loss_tokens)
        with Products() as counted:
            policy.backward(BATCH, lambda logprobs_T, _: logprobs_T.sum())
        return counted.count

    monkeypatch.setitem(KEPT_LOGITS, "cpu", 2**20)
    more = [products(3, is_checkpointed=each) - products(2, is_checkpointed=each) for each in (False, True)]
    assert more == [3, 4]
