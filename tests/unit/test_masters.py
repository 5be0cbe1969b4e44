"""bfloat16 parameters with float32 masters beside them, as one GPU trains them; built here on a CPU."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from lambdapo_async.config.learner import LearnerConfig
from learner.attention import select_attention
from learner.export import export_model
from learner.logprobs import packed_logprobs
from learner.model_loading import trained_dtype
from learner.optimizer import MasterOptimizer
from learner.parallel import ALONE, Ranks
from learner.policy import Policy
from tests.tiny_models import micro_batch, tiny_model_folder
from tests.unit.test_moe import CONFIGS

CPU, BF16 = torch.device("cpu"), torch.bfloat16
BATCHES = [micro_batch(lengths, seed=seed) for seed, lengths in enumerate([(9, 6, 12), (20,), (7, 7)])]
KINDS = ["qwen3", "llama", *CONFIGS]


def folder_of(kind: str, folder: Path) -> Path:
    if kind not in CONFIGS:
        return tiny_model_folder(folder, "llama" if kind == "llama" else "qwen3")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](), attn_implementation=select_attention(CPU))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return folder_of(request.param, tmp_path / "model")


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return folder_of("qwen3", tmp_path / "model")


def load(folder: Path, dtype: torch.dtype = BF16, **config: object) -> Policy:
    settings = LearnerConfig.model_validate({"lr": 1e-3, "max_grad_norm": 1e9, **config})
    return Policy.load(folder, revision=None, config=settings, temperature=1.0, device=CPU, dtype=dtype)


def likelihood(scale: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda logprobs_T, _: -logprobs_T.sum() * scale / 20


def train(policy: Policy, num_updates: int = 2) -> Policy:
    for _ in range(num_updates):
        for batch in BATCHES:
            policy.backward(batch, likelihood())
        policy.step()
    return policy


def masters(policy: Policy) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in policy.named_masters()}


def gradients(policy: Policy) -> dict[str, Tensor]:
    """Of what was accumulated, by a first update: its moments are a tenth of them."""
    policy.step()
    return {name: tensor * 10 for name, tensor in policy.optimizer_state().items() if name.startswith("exp_avg:")}


def assert_equal(found: object, expected: object) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_gradients_of_several_micro_batches_are_those_of_autocast(kind: str, tmp_path: Path) -> None:
    folder = folder_of(kind, tmp_path)
    exact, cast, held = load(folder, torch.float32), load(folder, torch.float32), load(folder)
    for batch in BATCHES:
        exact.backward(batch, likelihood())
        held.backward(batch, likelihood())
        with torch.autocast("cpu", BF16):
            cast.backward(batch, likelihood())
    expected, by_cast, found = gradients(exact), gradients(cast), gradients(held)
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    for name, tensor in expected.items():  # measured: 0.050 and 0.052 at most, and 0.032 between autocast and float32
        assert 0 < (found[name] - tensor).norm() < 0.08 * tensor.norm(), name
        assert (found[name] - by_cast[name]).norm() < 0.08 * tensor.norm(), name


def test_gradients_are_added_up_in_float32(dense: Path) -> None:
    """A 1,024th is below half of what bfloat16 resolves: added one by one it would vanish 64 times."""
    once, often = load(dense), load(dense)
    for policy in (once, often):
        policy.backward(BATCHES[0], likelihood())
    for _ in range(64):
        often.backward(BATCHES[0], likelihood(2**-10))
    found, expected = gradients(often), gradients(once)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor * (1 + 64 / 1024), rtol=1e-5, atol=1e-8)


def test_torch_compile_traces_parameters_between_micro_batches() -> None:
    """It refuses a parameter whose gradient is of another type, so sums must lie elsewhere."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = MasterOptimizer({"weight": parameter}, LearnerConfig(lr=1.0), {"weight": BF16})
    for factor in (1.0, 2**-10):
        torch.compile(lambda factor: (parameter * factor).sum(), backend="eager")(factor).backward()
        assert parameter.grad is None
    assert float(optimizer.clip(1e9)) == pytest.approx(math.sqrt(3) * (1 + 2**-10), rel=1e-6)
    optimizer.step(lr=1.0)
    assert parameter.dtype == BF16
    assert not parameter.any()


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_what_has_no_gradient_keeps_its_weight_and_no_moments(dtype: torch.dtype) -> None:
    def optimizer_of(used: nn.Parameter, idle: nn.Parameter) -> MasterOptimizer:
        return MasterOptimizer({"idle": idle, "used": used}, LearnerConfig(), {"idle": dtype, "used": dtype})

    parameters = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = optimizer_of(*parameters)
    parameters[0].sum().backward()
    optimizer.clip(1e9)
    optimizer.step(lr=0.5)
    assert [each.tolist() for each in parameters] == [[0.5] * 3, [1.0] * 3]
    assert set(optimizer.state()) == {"exp_avg:used", "exp_avg_sq:used", "step:used"}
    resumed = optimizer_of(*(nn.Parameter(torch.ones(3)) for _ in range(2)))
    resumed.load_state(optimizer.state())
    assert_equal(resumed.state(), optimizer.state())


def test_updates_too_small_for_bfloat16_add_up_over_steps(dense: Path) -> None:
    rounded = {name: tensor.to(BF16).float() for name, tensor in load_file(dense / "model.safetensors").items()}
    save_file(rounded, dense / "model.safetensors", metadata={"format": "pt"})
    policy = load(dense, lr=2e-4)
    name = "model.layers.0.mlp.up_proj.weight"
    large = (rounded[name].abs() > 0.26) & (rounded[name].abs() < 0.48)  # half a step of bfloat16 is 1e-3 there
    start = masters(policy)
    policy.backward(BATCHES[0], likelihood())
    policy.step()
    assert not (dict(policy.published())[name] != rounded[name])[large].any()
    assert (masters(policy)[name] != start[name])[large].all()
    for _ in range(19):
        policy.backward(BATCHES[0], likelihood())
        policy.step()
    assert (dict(policy.published())[name] != rounded[name])[large].float().mean() > 0.5


@pytest.mark.parametrize("options", [{}, {"optimizer_offload": True}], ids=["beside", "on the host"])
def test_a_resumed_policy_goes_on_bit_by_bit(folder: Path, tmp_path: Path, options: dict[str, bool]) -> None:
    first = train(load(folder, **options))
    first.save_model(tmp_path / "saved")
    second = load(tmp_path / "saved", **options)
    moments = {name: tensor.clone() for name, tensor in first.optimizer_state().items()}
    second.load_optimizer_state(moments, num_updates=2, num_skipped=0)
    assert {tensor.dtype for tensor in masters(first).values()} == {torch.float32}
    assert any((tensor != tensor.to(BF16)).any() for tensor in masters(first).values())
    for policy in (first, second):
        policy.logprobs(BATCHES[0])
    for _ in range(2):
        assert_equal(masters(second), masters(first))
        assert_equal(second.optimizer_state(), first.optimizer_state())
        assert_equal(dict(second.published()), dict(first.published()))
        assert_equal(second.logprobs(BATCHES[0]), first.logprobs(BATCHES[0]))
        train(first, 1)
        train(second, 1)


def test_what_is_published_and_exported_computes_what_the_learner_computes(folder: Path, tmp_path: Path) -> None:
    policy = load(folder)
    for number in range(2):
        policy.save_model(tmp_path / f"saved-{number}")
        target = tmp_path / f"exported-{number}"
        export_model(tmp_path / f"saved-{number}", target, dtype=BF16)
        assert_equal(load_file(target / "model.safetensors"), dict(policy.published()))
        model = AutoModelForCausalLM.from_pretrained(target, dtype=BF16, attn_implementation=select_attention(CPU))
        with torch.no_grad():
            expected_T, _ = packed_logprobs(model.eval(), BATCHES[0], temperature=1.0)
        assert_equal(policy.logprobs(BATCHES[0]), expected_T)
        train(policy)


def test_checkpoints_hold_the_masters(dense: Path, tmp_path: Path) -> None:
    policy = train(load(dense))
    policy.save_model(tmp_path / "saved")
    assert_equal(load_file(tmp_path / "saved" / "model.safetensors"), masters(policy))
    assert_equal(dict(policy.named_bf16()), {name: each.to(BF16) for name, each in policy.named_masters()})


class GroupedTypes(TorchDispatchMode):
    """Counts the types that reach torch's grouped multiplication, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "grouped_mm" in str(func):
            self.seen.update(each.dtype for each in args[:2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", CONFIGS)
def test_experts_multiply_in_bfloat16(kind: str, tmp_path: Path) -> None:
    policy = load(folder_of(kind, tmp_path), router_aux_coef=0.1)
    with GroupedTypes() as types:
        policy.backward(BATCHES[0], likelihood())
    assert set(types.seen) == {BF16}
    assert {tensor.dtype for tensor in gradients(policy).values()} == {torch.float32}


@pytest.mark.parametrize(
    "options",
    [{"optimizer_offload": True}, {"activation_checkpointing": True, "activation_offload": True}],
    ids=lambda options: "+".join(options),
)
def test_what_saves_memory_changes_no_number(folder: Path, options: dict[str, bool]) -> None:
    plain, saving = train(load(folder)), train(load(folder, **options))
    assert_equal(masters(saving), masters(plain))
    assert_equal(saving.optimizer_state(), plain.optimizer_state())
    assert_equal(dict(saving.published()), dict(plain.published()))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nothing_is_trained_on_a_gradient_that_is_not_finite(dense: Path, poison: float) -> None:
    policy, untouched = load(dense), load(dense)
    policy.backward(BATCHES[0], likelihood(poison))
    assert not math.isfinite(policy.step())
    assert_equal(masters(policy), masters(untouched))
    assert_equal(masters(train(policy)), masters(train(untouched)))
    assert (policy.num_updates, policy.num_skipped) == (2, 1)


def test_clipping_reports_the_norm_of_the_float32_sum(dense: Path) -> None:
    free, clipped = load(dense), load(dense, max_grad_norm=1e-3)
    for policy in (free, clipped):
        for batch in BATCHES:
            policy.backward(batch, likelihood())
    norm = free.step()
    expected = torch.stack([each.norm() * 10 for each in _moments(free)]).norm()
    assert norm == pytest.approx(float(expected), rel=1e-5)
    assert clipped.step() == norm
    for found, whole in zip(_moments(clipped), _moments(free), strict=True):
        torch.testing.assert_close(found, whole * (1e-3 / norm), rtol=1e-3, atol=1e-12)


def _moments(policy: Policy) -> Iterator[Tensor]:
    return (tensor for name, tensor in policy.optimizer_state().items() if name.startswith("exp_avg:"))


@pytest.mark.parametrize(
    ("device", "ranks", "lora", "expected"),
    [
        ("cuda", ALONE, None, BF16),
        ("cuda", ALONE, {"rank": 2}, torch.float32),
        ("cuda", Ranks(world_size=2), None, torch.float32),
        ("cpu", ALONE, None, torch.float32),
    ],
)
def test_only_a_gpu_that_trains_whole_weights_holds_them_in_bfloat16(
    device: str, ranks: Ranks, lora: dict[str, int] | None, expected: torch.dtype
) -> None:
    config = LearnerConfig.model_validate({"lora": lora})
    assert trained_dtype(config, torch.device(device), ranks) == expected
