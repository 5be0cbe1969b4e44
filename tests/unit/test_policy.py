import logging
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3Config

from lambdapo_async.config.learner import LearnerConfig
from lambdapo_async.errors import CheckpointError, ConfigError
from learner.policy import Policy, pick_device
from tests.tiny_models import SIZES, VOCAB, Architecture, micro_batch, tiny_model_folder

CPU = torch.device("cpu")
BATCH = micro_batch((9, 6, 12))


def load(folder: Path, **config: object) -> Policy:
    settings = LearnerConfig.model_validate({"lr": 1e-3, "max_grad_norm": 1e9, **config})
    return Policy.load(folder, revision=None, config=settings, temperature=1.0, device=CPU)


def negative_likelihood(logprobs_T: Tensor, _: Tensor) -> Tensor:
    return -logprobs_T.sum() / 20


def weights(policy: Policy) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in policy.named_masters()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_model_folder(tmp_path / "model")


def test_updates_raise_the_likelihood_and_match_adamw(folder: Path) -> None:
    policy, model = load(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert set(weights(policy)) == {name for name, _ in model.named_parameters()}
    before = policy.logprobs(BATCH).sum()
    start = weights(policy)
    policy.backward(BATCH, negative_likelihood)
    policy.step()
    moved = {name: (tensor - start[name]).abs().max() for name, tensor in weights(policy).items()}
    assert policy.logprobs(BATCH).sum() > before
    # Adam's first update moves every weight with a gradient by lr, whatever the gradient's size.
    assert max(moved.values()) == pytest.approx(1e-3, rel=1e-2)


def test_backward_returns_what_logprobs_returns(folder: Path) -> None:
    policy = load(folder)
    statistics = policy.backward(BATCH, negative_likelihood)
    torch.testing.assert_close(statistics.logprobs_T, policy.logprobs(BATCH))
    assert not statistics.logprobs_T.requires_grad
    assert (statistics.entropy_T[BATCH.loss_mask_T] > 0).all()


def test_logprobs_have_the_runs_temperature_or_one_that_is_asked_for(folder: Path) -> None:
    config, plain = LearnerConfig(), load(folder)
    policy = Policy.load(folder, revision=None, config=config, temperature=0.5, device=CPU)
    torch.testing.assert_close(policy.logprobs(BATCH, temperature=1.0), plain.logprobs(BATCH))
    torch.testing.assert_close(policy.logprobs(BATCH), plain.logprobs(BATCH, temperature=0.5))
    assert (policy.logprobs(BATCH) - plain.logprobs(BATCH)).abs().max() > 0.01


def test_two_micro_batches_give_the_gradient_of_one(folder: Path) -> None:
    whole, split = load(folder), load(folder)
    ids = BATCH.input_ids_T
    whole.backward(BATCH, negative_likelihood)
    split.backward(micro_batch((9,), ids=ids[:9]), negative_likelihood)
    split.backward(micro_batch((6, 12), ids=ids[9:]), negative_likelihood)
    assert whole.step() == pytest.approx(split.step(), rel=1e-5)
    torch.testing.assert_close(weights(whole), weights(split), rtol=1e-4, atol=1e-5)


def test_clipping_scales_the_gradient_and_reports_the_norm_before_it(folder: Path) -> None:
    free, clipped = load(folder), load(folder, max_grad_norm=1e-4)
    norms = []
    for policy in (free, clipped):
        policy.backward(BATCH, negative_likelihood)
        norms.append(policy.step())
    assert norms[0] == norms[1] > 1e-4
    ratio = clipped.optimizer_state()["exp_avg:model.norm.weight"] / free.optimizer_state()["exp_avg:model.norm.weight"]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1e-4 / norms[0]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nothing_is_trained_on_a_gradient_that_is_not_finite(folder: Path, poison: float) -> None:
    policy = load(folder)
    before = weights(policy)
    policy.backward(BATCH, lambda logprobs_T, _: logprobs_T.sum() * poison)
    assert not math.isfinite(policy.step())
    assert (policy.num_updates, policy.num_skipped) == (0, 1)
    torch.testing.assert_close(weights(policy), before, rtol=0, atol=0)
    policy.backward(BATCH, negative_likelihood)  # the poison is forgotten
    assert math.isfinite(policy.step())
    assert (policy.num_updates, policy.num_skipped) == (1, 1)


def test_learning_rate_warms_up_linearly_and_stays(folder: Path) -> None:
    policy = load(folder, warmup_steps=4)
    seen = []
    for _ in range(6):
        seen.append(policy.lr)
        policy.backward(BATCH, negative_likelihood)
        policy.step()
    assert seen == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])


@pytest.mark.parametrize(("architecture", "has_head"), [("qwen3", False), ("llama", True)])
def test_named_bf16_has_checkpoint_names_with_tied_weights_once(
    tmp_path: Path, architecture: Architecture, has_head: bool
) -> None:
    policy = load(tiny_model_folder(tmp_path, architecture))
    published = dict(policy.named_bf16())
    assert ("lm_head.weight" in published) == has_head
    assert "model.embed_tokens.weight" in published
    for name, master in policy.named_masters():
        torch.testing.assert_close(published[name], master.to(torch.bfloat16), rtol=0, atol=0)


def test_named_bf16_is_a_copy(folder: Path) -> None:
    policy = load(folder, lr=1.0)
    published = dict(policy.named_bf16())
    before = {name: tensor.clone() for name, tensor in published.items()}
    policy.backward(BATCH, negative_likelihood)
    policy.step()
    torch.testing.assert_close(published, before, rtol=0, atol=0)


def test_saved_model_is_one_transformers_loads(folder: Path, tmp_path: Path) -> None:
    policy = load(folder)
    policy.backward(BATCH, negative_likelihood)
    policy.step()
    policy.save_model(tmp_path / "saved")
    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).named_parameters())
    torch.testing.assert_close(
        {name: tensor.detach() for name, tensor in loaded.items()}, weights(policy), rtol=0, atol=0
    )
    assert load(tmp_path / "saved").model_files == policy.model_files


def test_optimizer_state_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    other = load(tiny_model_folder(tmp_path / "other", "llama"))
    other.backward(BATCH, negative_likelihood)
    other.step()
    with pytest.raises(CheckpointError, match="of another model"):
        load(folder).load_optimizer_state(other.optimizer_state(), num_updates=1, num_skipped=0)


def test_half_an_optimizer_state_is_refused(folder: Path) -> None:
    policy = load(folder)
    policy.backward(BATCH, negative_likelihood)
    policy.step()
    some = {name: tensor for name, tensor in policy.optimizer_state().items() if not name.startswith("exp_avg_sq:")}
    with pytest.raises(CheckpointError, match="first 'exp_avg_sq:"):
        load(folder).load_optimizer_state(some, num_updates=1, num_skipped=0)


def test_what_no_gradient_reaches_stays_and_the_rest_goes_on(tmp_path: Path) -> None:
    """The part of Gemma 3 that sees; others have biases that only choose experts."""
    text = {**SIZES, "query_pre_attn_scalar": 8, "sliding_window": 4, "model_type": "gemma3_text"}
    eye = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    eye |= {"image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model"}
    model = AutoModelForCausalLM.from_config(Gemma3Config(text_config=text, vision_config=eye, mm_tokens_per_image=4))
    model.save_pretrained(tmp_path / "gemma")
    policies = [load(tmp_path / "gemma"), load(tmp_path / "gemma")]
    start = weights(policies[0])
    for policy in policies:
        policy.backward(BATCH, negative_likelihood)
        policy.step()
    assert policies[0].max_positions == SIZES["max_position_embeddings"]
    stayed = {name for name, tensor in weights(policies[0]).items() if torch.equal(tensor, start[name])}
    assert stayed == {name for name in start if ".vision_tower." in name or ".multi_modal_projector." in name}
    policies[1].load_optimizer_state(
        {name: tensor.clone() for name, tensor in policies[0].optimizer_state().items()}, num_updates=1, num_skipped=0
    )
    for policy in policies:
        policy.backward(BATCH, negative_likelihood)
        policy.step()
    torch.testing.assert_close(weights(policies[1]), weights(policies[0]), rtol=0, atol=0)


def test_model_files_hold_config_and_tokenizer_but_no_weights(folder: Path) -> None:
    assert set(load(folder).model_files) == {"config.json", "generation_config.json", "tokenizer.json"}


def test_sizes(folder: Path) -> None:
    policy = load(folder)
    assert policy.vocab_size == VOCAB
    assert policy.num_parameters == sum(tensor.numel() for tensor in weights(policy).values())


def test_pick_device() -> None:
    assert pick_device("cpu") == CPU
    if not torch.cuda.is_available():
        assert pick_device("auto") == CPU
        with pytest.raises(ConfigError, match="no CUDA device"):
            pick_device("cuda")


OPTIONS = [
    {"activation_checkpointing": True},
    {"activation_checkpointing": True, "activation_offload": True},
    {"optimizer_offload": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options))
def test_what_saves_memory_changes_no_number(folder: Path, options: dict[str, bool]) -> None:
    plain, saving = load(folder), load(folder, **options)
    for policy in (plain, saving):
        for _ in range(3):
            policy.backward(BATCH, negative_likelihood)
            policy.step()
    torch.testing.assert_close(weights(saving), weights(plain), rtol=0, atol=0)
    torch.testing.assert_close(saving.optimizer_state(), plain.optimizer_state(), rtol=0, atol=0)


def test_the_optimizers_state_moves_between_host_and_device(folder: Path, tmp_path: Path) -> None:
    first = load(folder)
    first.backward(BATCH, negative_likelihood)
    first.step()
    first.save_model(tmp_path / "saved")
    second = load(tmp_path / "saved", optimizer_offload=True)
    moments = {name: tensor.clone() for name, tensor in first.optimizer_state().items()}
    second.load_optimizer_state(moments, num_updates=1, num_skipped=0)
    for policy in (first, second):
        policy.backward(BATCH, negative_likelihood)
        policy.step()
    torch.testing.assert_close(weights(second), weights(first), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]), ("cosine", [0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447, 0.0])],
)
def test_learning_rate_falls_to_zero_at_the_end_of_the_run(folder: Path, schedule: str, expected: list[float]) -> None:
    policy = load(folder, lr=1.0, lr_schedule=schedule, warmup_steps=2, num_steps=3, minibatches=2)
    seen = []
    for policy.num_updates in range(7):
        seen.append(policy.lr)
    assert seen == pytest.approx(expected, abs=1e-6)


def test_the_plan_is_logged_before_the_weights_are_read(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "model.safetensors").unlink()
    with caplog.at_level(logging.INFO), pytest.raises(ConfigError, match="cannot be loaded"):
        load(folder)
    assert "memory plan: weights" in caplog.text


def test_flops_are_counted_over_backward_passes(folder: Path) -> None:
    policy = load(folder)
    policy.backward(BATCH, negative_likelihood)
    once = policy.num_flops
    policy.backward(BATCH, negative_likelihood)
    assert policy.num_flops == 2 * once > 0


def test_masters_are_named_as_their_moments(folder: Path) -> None:
    policy = load(folder)
    policy.backward(BATCH, negative_likelihood)
    policy.step()
    names = {name.split(":")[1] for name in policy.optimizer_state()}
    assert names == set(weights(policy)) == set(dict(policy.named_weights()))


def test_compiling_renames_nothing(folder: Path) -> None:
    assert set(weights(load(folder, compile=True))) == set(weights(load(folder)))
