"""The learner's canary: rows of the task, scored as the model alone scores them."""

from pathlib import Path

import pytest
import torch

from lambdapo_async.config.load import load_config
from lambdapo_async.errors import ConfigError
from lambdapo_async.packing import MicroBatch
from lambdapo_async.tasks.interface import Row
from lambdapo_async.tasks.prompts import PromptEncoder
from lambdapo_async.tasks.registry import build_task
from lambdapo_async.weights.canary import Canary
from learner.canary import LearnerCanary, canary_sequences
from learner.character_tokenizer import build_tokenizer
from learner.logprobs import packed_logprobs
from tests.canaries import CHECKSUM, IDENTITY
from tests.fakes_canary import FakeCanaryStore
from tests.tiny_models import tiny_model


class TinyPolicy:
    """``ScoringPolicy`` on a real model."""

    device = torch.device("cpu")

    def __init__(self, *, seed: int = 0) -> None:
        self.model = tiny_model(seed=seed, vocab_size=200)

    @torch.no_grad()
    def logprobs(self, micro_batch: MicroBatch, *, temperature: float) -> torch.Tensor:
        return packed_logprobs(self.model, micro_batch, temperature=temperature)[0]


@pytest.fixture
def encoder(tmp_path: Path) -> PromptEncoder:
    path = tmp_path / "c.toml"
    path.write_text(
        '[model]\npath = "starter"\nmax_length = 128\n[task]\nkind = "arithmetic"\n[sampling]\nmax_tokens = 64'
    )
    config = load_config(path, (), environ={})
    return PromptEncoder(build_tokenizer(128), build_task(config), config)


ROWS_OF_TASK = [
    Row(prompt="1+2=", answer="3", solution="1+2=3"),
    Row(prompt="2+2=", answer="4"),
    Row(prompt="x", answer="5"),
]


def test_the_learner_scores_prompt_and_solution_as_the_model_alone_does(encoder: PromptEncoder) -> None:
    sequences = canary_sequences([ROWS_OF_TASK, ROWS_OF_TASK[1:]], encoder, build_tokenizer(128), max_tokens=3)
    assert [int(sequence.loss_mask.sum()) for sequence in sequences] == [3, 1, 1, 1]
    store, policy = FakeCanaryStore(), TinyPolicy()
    learner = LearnerCanary(store, policy, sequences, identity=IDENTITY, fence=1)
    assert learner.is_due(0)
    learner.publish(0, CHECKSUM, keyframe_version=0)
    assert not learner.is_due(7)  # dense updates: every version is a keyframe
    assert learner.is_due(8)
    store.ask_canary()
    assert learner.is_due(0)
    record = store.canary()
    assert record is not None
    for row in Canary.from_bytes(record).rows:
        ids = torch.tensor([[*row.prompt_ids, *row.completion_ids]])
        logprobs = torch.log_softmax(plain_logits(policy, ids), -1)
        expected = [float(logprobs[len(row.prompt_ids) + i - 1, token]) for i, token in enumerate(row.completion_ids)]
        assert list(row.logprobs) == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def plain_logits(policy: TinyPolicy, ids: torch.Tensor) -> torch.Tensor:
    """[L, V] of transformers' own attention."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_config(policy.model.config, attn_implementation="eager").eval()
    plain.load_state_dict(policy.model.state_dict())
    return plain(ids).logits[0]


def test_rows_without_a_reference_are_left_out(encoder: PromptEncoder) -> None:
    with pytest.raises(ConfigError, match="solution or answer"):
        canary_sequences([[Row(prompt="1+1=", answer="")]], encoder, build_tokenizer(128), max_tokens=8)
