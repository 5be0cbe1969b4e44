"""What saves memory on a GPU: the same numbers, fewer bytes, and a plan that foretells them."""

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from lambdapo_async.config.learner import LearnerConfig
from learner.flops import utilisation
from learner.memory_plan import free_memory, plan_memory, read_shape
from learner.policy import Policy
from tests.tiny_models import micro_batch, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LENGTHS = (900, 700, 448)
NUM_TOKENS = sum(LENGTHS)
SHAPE = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "head_dim": 64, "num_attention_heads": 8,
    "max_position_embeddings": 1024,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("model")
    tiny_model(**SHAPE).save_pretrained(target)
    return target


def load(folder: Path, **changes: object) -> Policy:
    config = LearnerConfig.model_validate({"lr": 1e-4, "micro_batch_tokens": NUM_TOKENS, **changes})
    return Policy.load(folder, revision=None, config=config, temperature=1.0, device=torch.device("cuda"))


def train(policy: Policy, num_updates: int = 2) -> tuple[float, int]:
    """(sum of log pi after training, peak bytes of the last update)."""
    batch = micro_batch(LENGTHS).to(policy.device)
    for _ in range(num_updates):
        torch.cuda.reset_peak_memory_stats()
        policy.backward(batch, lambda logprobs_T, _: -logprobs_T.sum() / NUM_TOKENS)
        policy.step()
    return float(policy.logprobs(batch).sum()), torch.cuda.max_memory_allocated()


OPTIONS = [
    {"activation_checkpointing": True},
    {"activation_checkpointing": True, "activation_offload": True},
    {"optimizer_offload": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options))
def test_an_option_takes_less_memory_for_the_same_training(folder: Path, options: dict[str, bool]) -> None:
    policy = load(folder)
    plain, plain_peak = train(policy)
    del policy
    saving, saving_peak = train(load(folder, **options))
    assert saving == pytest.approx(plain, rel=2e-3)
    assert saving_peak < 0.95 * plain_peak


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_the_peak_is_not_above_the_plan(folder: Path, is_checkpointed: bool) -> None:
    small = torch.ones(8, 8, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    (small @ small).sum().backward()  # takes the matrix library's workspaces, which a model of this size would notice
    before = torch.cuda.memory_allocated()
    policy = load(folder, activation_checkpointing=is_checkpointed)
    config = LearnerConfig(micro_batch_tokens=NUM_TOKENS, activation_checkpointing=is_checkpointed)
    planned = plan_memory(read_shape(folder), config, "cuda").device
    _, peak = train(policy)
    assert planned / 2 < peak - before < planned * 1.05


@pytest.mark.filterwarnings("default")  # the compiler's own
def test_compiled_layers_give_the_same_training_at_several_lengths(folder: Path, compiler: None) -> None:
    plain, compiled = load(folder), load(folder, compile=True)
    for lengths in ((200, 31), (64,), (300, 5, 17)):
        batch = micro_batch(lengths).to(plain.device)
        found = [policy.backward(batch, lambda logprobs_T, _: -logprobs_T.mean()) for policy in (plain, compiled)]
        assert (found[0].logprobs_T - found[1].logprobs_T).abs().mean() < 0.02
    assert compiled.step() == pytest.approx(plain.step(), rel=2e-2)
    assert counters["stats"]["unique_graphs"] > 0


def test_adapters_train_beside_bfloat16_weights(folder: Path) -> None:
    pytest.importorskip("peft")
    policy = load(folder, lora={"rank": 4}, lr=1e-3)
    batch = micro_batch(LENGTHS).to(policy.device)
    before = float(policy.logprobs(batch).sum())
    after, _ = train(policy, num_updates=5)
    assert after > before
    assert {tensor.dtype for _, tensor in policy.named_masters()} == {torch.float32}


def test_the_device_says_what_is_free_and_what_it_can() -> None:
    assert 0 < (free_memory("cuda") or 0) <= torch.cuda.get_device_properties(0).total_memory
    share = utilisation(1e12, 1.0, torch.device("cuda"))
    assert share is None or 0 < share < 1
