"""The last token of a completion is predicted and never fed: no number of a step depends on it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lambdapo_async.packing import MicroBatch, TrainingSequence, pack
from learner.attention import select_attention
from learner.logprobs import packed_logprobs
from tests.tiny_models import VOCAB, tiny_model_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    folder: Path = tiny_model_folder(tmp_path_factory.mktemp("model"))
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=select_attention(torch.device("cpu"))
    )
    return loaded.eval()  # type: ignore[no-any-return]


def sequences(prompt: int, completions: list[int], *, extra: int = 0) -> list[TrainingSequence]:
    """Rollouts of one prompt; ``extra`` more tokens without loss come behind each."""
    source = np.random.default_rng(prompt)
    prompt_ids = source.integers(VOCAB, size=prompt)
    found = []
    for number, length in enumerate(completions):
        ids = np.concatenate([prompt_ids, source.integers(VOCAB, size=length), np.zeros(extra, np.int64)])
        positions = np.arange(len(ids))
        own = (positions >= prompt) & (positions < prompt + length)
        found.append(
            TrainingSequence(
                token_ids=ids.astype(np.int32),
                loss_mask=own,
                behavior_logprobs=np.where(own, -1.0, 0.0).astype(np.float32),
                advantage=number - 1.5,
                token_versions=np.where(own, 0, -1),
                group_key="train:0:0",
            )
        )
    return found


def gradients(model: PreTrainedModel, batch: MicroBatch) -> list[torch.Tensor]:
    """Of a loss with another weight for each rollout, and an entropy term."""
    model.zero_grad(set_to_none=True)
    logprobs_T, entropy_T = packed_logprobs(model, batch, temperature=0.7)
    torch.autograd.backward((batch.advantages_T * logprobs_T + 0.3 * entropy_T).sum())
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("completions", [[6, 3, 3, 1], [5]])
def test_gradients_are_those_of_a_model_that_is_fed_every_token(model: PreTrainedModel, completions: list[int]) -> None:
    (trimmed,) = pack(sequences(4, completions), token_budget=64)
    # Behind one more token the last with loss is no longer the rollout's last, so the model is fed it.
    (whole,) = pack(sequences(4, completions, extra=1), token_budget=64)
    assert whole.layout.num_tokens - trimmed.layout.num_tokens == len(completions)
    assert trimmed.num_loss_tokens == whole.num_loss_tokens == sum(completions)
    found, expected = gradients(model, trimmed), gradients(model, whole)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        # The same sums in another order.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert any(each.abs().max() > 1e-3 for each in found)
