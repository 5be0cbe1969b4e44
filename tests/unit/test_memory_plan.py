from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, XmodConfig

from benchmarks.model_shapes import SHAPES
from lambdapo_async.config.learner import LearnerConfig
from lambdapo_async.errors import ConfigError
from learner.activations import enable_checkpointing
from learner.memory_plan import GIB, MemoryPlan, check_fits, free_memory, plan_memory, read_shape
from learner.policy import Policy
from learner.projection import CHUNK_LOGITS, KEPT_LOGITS
from tests.tiny_models import SIZES, micro_batch, tiny_model, tiny_model_folder
from tests.unit.test_activations import BATCH, saved_bytes
from tests.unit.test_moe import CONFIGS

NUM_TOKENS = len(BATCH.input_ids_T)
CPU = torch.device("cpu")


def config(**changes: object) -> LearnerConfig:
    return LearnerConfig.model_validate({"micro_batch_tokens": NUM_TOKENS, **changes})


def test_states_are_those_of_a_policy_that_took_an_update(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    policy = Policy.load(folder, revision=None, config=config(), temperature=1.0, device=CPU)
    batch = micro_batch((9, 12))
    policy.backward(batch, lambda logprobs_T, _: -logprobs_T.sum())
    policy.step()
    plan = plan_memory(read_shape(folder), config(), "cpu")
    measured = sum(tensor.nbytes for _, tensor in policy.named_masters())
    moments = sum(tensor.nbytes for name, tensor in policy.optimizer_state().items() if "step" not in name)
    assert (plan.weights, plan.gradients, plan.optimizer, plan.masters) == (measured, measured, moments, 0)


def test_one_gpu_holds_bfloat16_weights_beside_their_masters(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    policy = Policy.load(folder, revision=None, config=config(), temperature=1.0, device=CPU, dtype=torch.bfloat16)
    policy.backward(micro_batch((9, 12)), lambda logprobs_T, _: -logprobs_T.sum())
    policy.step()
    plan = plan_memory(read_shape(folder), config(), "cuda")
    sizes = [tensor.numel() for _, tensor in policy.named_masters()]
    assert plan.weights == sum(tensor.nbytes for _, tensor in policy.named_bf16()) == 2 * sum(sizes)
    assert plan.masters == sum(tensor.nbytes for _, tensor in policy.named_masters()) == 4 * sum(sizes)
    assert plan.gradients == 4 * sum(sizes) + 2 * max(sizes)
    assert plan.optimizer == 8 * sum(sizes)


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_activations_of_several_documents_are_within_the_plan(architecture, is_checkpointed) -> None:
    model = tiny_model(architecture, hidden_size=64, intermediate_size=192, num_hidden_layers=3, head_dim=16)
    if is_checkpointed:
        enable_checkpointing(model)
    plan = plan_memory(model, config(activation_checkpointing=is_checkpointed), "cpu")
    assert 0.95 * plan.activations < saved_bytes(model) < plan.activations + plan.logits


def test_a_model_that_looks_at_numbers_is_planned_without_activations(caplog: pytest.LogCaptureFixture) -> None:
    """Experts in a loop ask which tokens are theirs."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS["qwen3_moe"](), experts_implementation="eager")
    plan = plan_memory(model, config(), "cuda")
    assert (plan.activations, plan.layer) == (2 * NUM_TOKENS * model.config.hidden_size, 0)
    assert "leaves out the activations of a Qwen3MoeForCausalLM" in caplog.text


def test_a_model_that_refuses_the_plan_s_forward_pass_is_planned_without_activations() -> None:
    """It is judged by the packing check, in words."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(XmodConfig(**{**SIZES, "is_decoder": True}))
    assert plan_memory(model, config(), "cpu").layer == 0  # no default language


def test_ranks_share_the_states_and_gather_a_part() -> None:
    model = tiny_model(num_hidden_layers=8)
    alone, shared = (plan_memory(model, config(), "cpu", world_size=size) for size in (1, 4))
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(shared, name) == getattr(alone, name) // 4
    assert shared.activations == alone.activations
    layer, outside = 2 * 32 * (32 + 16) + 3 * 32 * 48 + 2 * 32 + 2 * 8, 61 * 32 + 32
    in_float32, in_bfloat16 = (plan_memory(model, config(), kind, world_size=4).gathered for kind in ("cpu", "cuda"))
    assert (alone.gathered, shared.gathered) == (0, in_float32)
    # Of whole parts weights, gradients, and the buffer that ranks add up in float32.
    assert (in_float32, in_bfloat16) == ((outside + 2 * layer) * 12, (outside + 2 * layer) * 8)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_ranks_share_what_an_offload_moves_to_the_host(device: str) -> None:
    model = tiny_model("qwen3")
    alone, shared = (plan_memory(model, config(optimizer_offload=True), device, world_size=size) for size in (1, 4))
    assert shared.host == pytest.approx(alone.host / 4, abs=8)


def test_every_option_takes_memory_from_where_it_says() -> None:
    model = tiny_model()
    plain = plan_memory(model, config(), "cuda")
    checkpointed = plan_memory(model, config(activation_checkpointing=True), "cuda")
    offloaded = plan_memory(model, config(activation_checkpointing=True, activation_offload=True), "cuda")
    on_host = plan_memory(model, config(optimizer_offload=True), "cuda")
    adapters = plan_memory(model, config(lora={"rank": 2}), "cuda")
    assert checkpointed.activations < plain.activations / 4
    assert checkpointed.layer == 2 * plain.layer, "its activations again, beside their gradients"
    assert (offloaded.host, plain.host) == (checkpointed.activations, 0)
    assert plain.device - on_host.device == plain.masters + plain.optimizer
    assert on_host.host == 4 * plain.masters
    assert adapters.gradients < plain.gradients / 4
    assert adapters.masters == 0 < plain.masters


def test_an_8b_model_has_the_sizes_one_computes_by_hand() -> None:
    shape = Qwen3Config(
        vocab_size=151_936, hidden_size=4096, intermediate_size=12_288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    plan = plan_memory(model, LearnerConfig(micro_batch_tokens=8192, activation_checkpointing=True), "cuda")
    assert (plan.weights, plan.masters, plan.optimizer) == tuple(size * 8_190_735_360 for size in (2, 4, 8))
    assert plan.gradients == 4 * 8_190_735_360 + 2 * 151_936 * 4096
    inputs, norm, output = 36 * 4096 * 2, 4096 * (4 + 2), 4096 * 2
    assert plan.activations == pytest.approx((inputs + norm + output) * 8192, rel=0.001)
    assert plan.device / GIB == pytest.approx(150, rel=0.1)


PLAN = MemoryPlan(
    weights=2 * GIB, masters=4 * GIB, gradients=4 * GIB, optimizer=8 * GIB, activations=GIB, layer=0,
    logits=GIB, optimizer_on_host=False, activations_on_host=False,
)  # fmt: skip


def test_what_does_not_fit_is_refused_with_numbers_and_a_way_out() -> None:
    check_fits(PLAN, "cuda", device_free=20 * GIB, host_free=0)
    with pytest.raises(
        ConfigError, match=r"needs 20\.00 GiB of GPU memory, of which 19\.00 GiB .* optimizer 8\.00.* lower"
    ):
        check_fits(PLAN, "cuda", device_free=19 * GIB, host_free=None)
    offloaded = replace(PLAN, optimizer_on_host=True)
    check_fits(offloaded, "cuda", device_free=8 * GIB, host_free=12 * GIB)
    with pytest.raises(ConfigError, match=r"needs 12\.00 GiB of host memory"):
        check_fits(offloaded, "cuda", device_free=8 * GIB, host_free=11 * GIB)
    with pytest.raises(ConfigError, match=r"needs 20\.00 GiB of memory"):
        check_fits(offloaded, "cpu", device_free=None, host_free=19 * GIB)
    check_fits(PLAN, "cpu", device_free=None, host_free=None)


def test_every_rank_reads_a_whole_model_into_the_hosts_memory() -> None:
    model = tiny_model()
    alone, shared = (plan_memory(model, config(), "cpu", world_size=size) for size in (1, 4))
    assert (alone.loading, shared.loading) == (0, alone.weights)
    on_gpu, adapters = (plan_memory(model, config(lora=lora), "cuda") for lora in (None, {"rank": 2}))
    assert (on_gpu.loading, adapters.loading) == (alone.weights, alone.weights // 2)
    plan = replace(PLAN, loading=4 * GIB)
    assert "4.00 GiB of host memory while it is read" in plan.describe()
    check_fits(plan, "cuda", device_free=20 * GIB, host_free=4 * GIB)
    with pytest.raises(
        ConfigError, match=r"takes 4\.00 GiB of host memory on every rank, and 3\.00 GiB .* fewer ranks"
    ):
        check_fits(plan, "cuda", device_free=20 * GIB, host_free=3 * GIB)


def test_a_policy_that_does_not_fit_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    (folder / "model.safetensors").unlink()
    huge = config(micro_batch_tokens=10**12)
    with pytest.raises(ConfigError, match=r"training needs .* GiB of memory"):
        Policy.load(folder, revision=None, config=huge, temperature=1.0, device=CPU)


def test_free_memory_is_plausible() -> None:
    free = free_memory("cpu")
    assert free is None or 2**26 < free < 2**46


def test_logits_are_kept_up_to_a_limit_and_not_where_layers_are_recomputed() -> None:
    with torch.device("meta"):
        model = SHAPES["0.6b"]._build()
    chunk = 3 * 4 * CHUNK_LOGITS["cuda"]

    def planned(num_tokens: int, *, is_checkpointed: bool = False) -> int:
        settings = LearnerConfig(micro_batch_tokens=num_tokens, activation_checkpointing=is_checkpointed)
        return plan_memory(model, settings, "cuda").logits - chunk

    assert planned(4096) == 2 * 4096 * model.config.vocab_size
    assert planned(2**16) == planned(2**15) == 2 * KEPT_LOGITS["cuda"], "whatever the tokens"
    assert planned(2**16, is_checkpointed=True) == 0
