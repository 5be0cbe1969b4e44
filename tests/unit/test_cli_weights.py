import contextlib
import json
from pathlib import Path

import pytest
import redis
import torch
from safetensors.torch import load_file

from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.cli.errors import run_main
from lambdapo_async.cli.weights import app
from lambdapo_async.config import RunConfig
from lambdapo_async.keys import RunKeys
from lambdapo_async.weights.adapter import PREFIX
from lambdapo_async.weights.state import State
from tests.full_disk import full_disk
from tests.redis_fixtures import next_run_id
from tests.weight_history import MODEL_FILES, full_file, published, versions


@pytest.fixture
def run_id(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("COLUMNS", "160")
    run_id = next_run_id()
    run = RedisRun(redis_url, run_id, timeout_s=10)
    run.run_store.create(b"{}", MODEL_FILES, fence=1)
    for version, files in enumerate(published(versions(5), run_id=run_id)):
        run.weights.publish(version, files, consumed=0, fence=1)
    run.close()
    return run_id


def weights(*arguments: object) -> int:
    """Exit status of ``lambdapo weights ARGUMENTS``."""
    with pytest.raises(SystemExit) as ended:
        run_main(app, [str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_ls_lists_every_file(run_id: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert weights("ls", "--run-id", run_id) == 0
    output = capsys.readouterr().out
    assert "6 files" in output
    assert output.count("step") == 4
    assert "0 to 2" in output
    assert "100.00%" in output
    (head,) = [line for line in output.splitlines() if line.rstrip(" │").endswith("head")]
    assert head.split()[1] == "4"


def test_show_says_what_a_version_changed(run_id: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert weights("show", 3, "--run-id", run_id) == 0
    output = capsys.readouterr().out
    assert "gap-step" in output
    assert "gap-abs" in output
    (layer,) = [line for line in output.splitlines() if "model.layers.1" in line]
    assert "0.250%" in layer
    assert weights("show", 0, "--run-id", run_id, "--tensors") == 0
    assert "not known" in capsys.readouterr().out


def test_diff_of_two_versions(run_id: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert weights("diff", 0, 4, "--run-id", run_id, "--tensors") == 0
    lines = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if len(line.split()) > 4}
    assert "1.000%" in lines["model.layers.1.mlp.weight"]
    assert "100.000%" in lines["lm_head.weight"]
    assert "0.000%" in lines["model.layers.0.mlp.weight"]


def test_export_writes_a_folder_once(run_id: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out"
    assert weights("export", 2, "--to", target, "--run-id", run_id) == 0
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert weights("export", 2, "--to", target, "--run-id", run_id) == 2
    assert "exists already" in capsys.readouterr().err


def test_export_to_a_full_disk_is_one_line(run_id: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with full_disk():
        assert weights("export", 2, "--to", tmp_path / "model", "--run-id", run_id) == 2
    assert "model cannot be written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_export_merges_adapters(redis_url: str, run_id: str, tmp_path: Path) -> None:
    config = RunConfig.model_validate(
        {"model": {"path": "m"}, "task": {"kind": "arithmetic"}, "learner": {"lora": {"rank": 2, "alpha": 1.0}}}
    )
    adapted = next_run_id()
    layer = "model.layers.0.mlp.up_proj"
    tensors = {
        f"{layer}.weight": torch.zeros(3, 4),
        f"{PREFIX}{layer}.lora_A.weight": torch.full((2, 4), 3.0),
        f"{PREFIX}{layer}.lora_B.weight": torch.full((3, 2), 5.0),
    }
    state = State.of_torch(0, {name: tensor.bfloat16() for name, tensor in tensors.items()})
    with contextlib.closing(RedisRun(redis_url, adapted, timeout_s=10)) as run:
        run.run_store.create(json.dumps(config.published()).encode(), MODEL_FILES, fence=1)
        run.weights.publish(0, [full_file(state, run_id=adapted)], consumed=0, fence=1)
    assert weights("export", 0, "--to", tmp_path / "out", "--run-id", adapted) == 0
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == {f"{layer}.weight"}
    assert torch.equal(saved[f"{layer}.weight"], torch.full((3, 4), 0.5 * 2 * 15.0).bfloat16())


def test_verify_is_silent_about_whole_weights(run_id: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert weights("verify", "--run-id", run_id) == 0
    assert "the same by every way" in capsys.readouterr().out


def test_verify_names_damaged_weights(redis_url: str, run_id: str, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.closing(redis.Redis.from_url(redis_url)) as server:
        chunk = RunKeys(run_id).weights_chunk("2.step", 0)
        middle = server.strlen(chunk) // 2
        flipped = server.getrange(chunk, middle, middle)[0] ^ 1
        server.setrange(chunk, middle, bytes([flipped]))
    assert weights("verify", "--run-id", run_id) == 1
    output, error = capsys.readouterr()
    assert "the same by every way" not in output
    assert "chunk 0 of 2.step" in error
    assert error.endswith(f"problems in the weights of run {run_id}\n")
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["show", 9, "--run-id", "RUN"], "these can: 0, 1, 2, 3, 4"),
        (["ls", "--run-id", "none"], "holds no run"),
        (["ls", "--run-id", "RUN", "--redis-url", "unix:///nowhere"], "does it run"),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    run_id: str, capsys: pytest.CaptureFixture[str], arguments: list[object], expected: str
) -> None:
    assert weights(*(run_id if each == "RUN" else each for each in arguments)) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
