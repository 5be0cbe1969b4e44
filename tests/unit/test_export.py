import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lambdapo_async.cli.errors import run_main
from lambdapo_async.config.learner import LearnerConfig
from learner.character_tokenizer import build_tokenizer
from learner.checkpoint import CheckpointStore, LearnerState
from learner.export import app
from learner.policy import Policy
from tests.full_disk import full_disk
from tests.processes import ROOT
from tests.tiny_models import micro_batch, tiny_model

LORA = {"rank": 2, "target_modules": ["v_proj"]}


def policy_at(folder: Path, **config: object) -> Policy:
    """A policy that took an update, of a model with tokenizer and generation config."""
    tokenizer = build_tokenizer(128)
    model = tiny_model(vocab_size=len(tokenizer))
    model.generation_config = GenerationConfig(eos_token_id=3, temperature=0.7, do_sample=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = LearnerConfig.model_validate({"lr": 1e-2, **config})
    policy = Policy.load(folder, revision=None, config=settings, temperature=1.0, device=torch.device("cpu"))
    return train(policy)


def train(policy: Policy) -> Policy:
    for _ in range(2):  # LoRA's A moves in the second
        policy.backward(micro_batch((9, 12)), lambda logprobs_T, _: -logprobs_T.sum() / 20)
        policy.step()
    return policy


def state(step: int) -> LearnerState:
    return LearnerState(step=step, version=step)


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(1, 12)[None]).logits


def expected_logits(policy: Policy) -> Tensor:
    """Of the weights that the policy publishes, in a model made another way."""
    model = AutoModelForCausalLM.from_config(
        tiny_model(vocab_size=policy.vocab_size).config, attn_implementation="sdpa"
    )
    weights = dict(policy.named_weights())
    model.load_state_dict({**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})
    return logits(model)


def export(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        run_main(app, [str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture(params=[None, LORA], ids=["full", "lora"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[int, Tensor]]:
    """A run's folder with checkpoints of steps 2 and 4, and the logits of each."""
    if request.param:
        pytest.importorskip("peft")
    policy = policy_at(tmp_path / "model", lora=request.param)
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    store.take_fence()
    found = {}
    for step in (2, 4):
        store.save(state(step), train(policy))
        found[step] = expected_logits(policy)
    return tmp_path / "run", found


def test_every_kept_checkpoint_loads_with_tokenizer_and_generation_config(run) -> None:
    folder, expected = run
    models = sorted((folder / "checkpoints").glob("step-*/model"))
    for model_dir, step in zip(models, (2, 4), strict=True):
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        torch.testing.assert_close(logits(model), expected[step])
        assert model.generation_config.eos_token_id == 3
        assert AutoTokenizer.from_pretrained(model_dir).decode([5]) == build_tokenizer(128).decode([5])


@pytest.mark.parametrize(("arguments", "step"), [((), 4), (("--step", 2), 2)])
def test_an_export_loads_and_says_what_the_policy_says(run, tmp_path: Path, arguments, step: int) -> None:
    folder, expected = run
    target = tmp_path / "exported"
    assert export(folder, "--to", target, *arguments, "--dtype", "float32") == 0
    model = AutoModelForCausalLM.from_pretrained(target)
    assert model.dtype == torch.float32
    torch.testing.assert_close(logits(model), expected[step])
    assert model.generation_config.temperature == 0.7
    assert AutoTokenizer.from_pretrained(target).decode([5]) == build_tokenizer(128).decode([5])
    assert {path.name for path in tmp_path.iterdir()} == {"model", "run", "exported"}  # nothing half written


def test_bfloat16_is_the_default_and_config_says_so(tmp_path: Path) -> None:
    policy = policy_at(tmp_path / "model")
    assert export(exported_run(tmp_path, policy), "--to", tmp_path / "exported") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert model.dtype == torch.bfloat16
    found = {name: tensor.detach() for name, tensor in model.named_parameters()}
    torch.testing.assert_close(found, dict(policy.named_bf16()), rtol=0, atol=0)


def exported_run(tmp_path: Path, policy: Policy) -> Path:
    """A run's folder with one checkpoint of ``policy``."""
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    store.take_fence()
    store.save(state(1), policy)
    return tmp_path / "run"


def test_a_generation_config_is_kept_that_transformers_would_not_write(tmp_path: Path) -> None:
    """As Llama 2's: it names a temperature, and does not say that it samples."""
    policy_at(tmp_path / "model")
    content = '{"temperature": 0.6, "top_p": 0.9}'
    (tmp_path / "model" / "generation_config.json").write_text(content)
    settings = LearnerConfig()
    policy = Policy.load(
        tmp_path / "model", revision=None, config=settings, temperature=1.0, device=torch.device("cpu")
    )
    assert export(exported_run(tmp_path, policy), "--to", tmp_path / "exported") == 0
    assert (tmp_path / "exported" / "generation_config.json").read_text() == content


def test_without_a_generation_config_the_model_ends_where_its_config_says(tmp_path: Path) -> None:
    policy_at(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").unlink()
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "eos_token_id": 3}))
    policy = Policy.load(
        tmp_path / "model", revision=None, config=LearnerConfig(), temperature=1.0, device=torch.device("cpu")
    )
    assert export(exported_run(tmp_path, policy), "--to", tmp_path / "exported") == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert exported.generation_config.eos_token_id == 3


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = exported_run(tmp_path, policy_at(tmp_path / "model"))
    with full_disk(30_000):  # config and tokenizer fit, weights do not
        status = export(folder, "--to", tmp_path / "exported")
    error = capsys.readouterr().err
    assert (status, error.count("\n"), "exported cannot be written" in error) == (2, 1, True), error
    assert {path.name for path in tmp_path.iterdir()} == {"model", "run"}


def test_a_dry_run_names_the_checkpoint_and_writes_nothing(run, tmp_path: Path, capsys) -> None:
    folder, _ = run
    assert export(folder, "--to", tmp_path / "exported", "--dry-run") == 0
    assert "step-00000004.fence-1.save-2" in capsys.readouterr().out
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("run", "--to", "run"), "exists already"),
        (("run", "--to", "no/where"), "is no folder"),
        (("elsewhere", "--to", "exported"), "holds no checkpoint"),
        (("run", "--step", "3", "--to", "exported"), "no checkpoint of step 3, only of [1]"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments, complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "checkpoints" / "step-00000001.fence-1.save-1").mkdir(parents=True)
    assert export(*arguments) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def test_the_command_is_the_modules(tmp_path: Path) -> None:
    arguments = ["export", tmp_path, "--to", tmp_path / "exported"]
    done = subprocess.run(
        [sys.executable, "-m", "lambdapo_async.cli.app", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert (done.returncode, "holds no checkpoint" in done.stderr) == (2, True), done.stderr
