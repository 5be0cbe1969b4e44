"""The starter model: whole, reproducible, readable by transformers, and good for a start."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from lambdapo_async.config import RunConfig
from lambdapo_async.errors import DiskError, TaskError
from lambdapo_async.tasks.arithmetic import score_arithmetic
from lambdapo_async.tasks.interface import Row, Task
from lambdapo_async.tasks.registry import build_task
from learner.character_tokenizer import CHARACTERS, UNKNOWN, build_tokenizer
from learner.starter import ARITHMETIC, SMOKE, Recipe, build_starter, ensure_starter, recipe_for, starter_path
from tests.full_disk import full_disk

TINY = Recipe(num_steps=3, batch_tokens=200, hidden_size=32, intermediate_size=32, num_layers=1, num_heads=2)
GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k"


def arithmetic_config(folder: Path, *, seed: int = 0, max_length: int = 64) -> RunConfig:
    return RunConfig.model_validate(
        {
            "seed": seed,
            "output_dir": str(folder),
            "model": {"path": "starter", "max_length": max_length},
            "task": {"kind": "arithmetic", "num_train": 2000, "num_heldout": 200},
            "sampling": {"max_tokens": 40},
        }
    )


def jsonl_config(folder: Path, train: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "output_dir": str(folder),
            "model": {"path": "starter", "max_length": 128},
            "task": {"kind": "jsonl", "train_path": str(train), "heldout_path": str(train)},
            "sampling": {"max_tokens": 40},
        }
    )


def arithmetic() -> Task:
    return build_task(arithmetic_config(Path("unused")))


@given(st.text(CHARACTERS, min_size=1))
def test_characters_are_tokens_and_come_back(text: str) -> None:
    tokenizer = build_tokenizer(64)
    token_ids = tokenizer.encode(text, add_special_tokens=True)
    assert len(token_ids) == len(text)
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == text


def test_other_characters_are_unknown_and_special_tokens_are_left_out() -> None:
    tokenizer = build_tokenizer(64)
    token_ids = tokenizer.encode("5€\t")
    assert tokenizer.convert_ids_to_tokens(token_ids) == ["5", UNKNOWN, UNKNOWN]
    assert (
        tokenizer.decode([*token_ids, tokenizer.eos_token_id, tokenizer.pad_token_id], skip_special_tokens=True) == "5"
    )


def test_gsm8k_rows_encode() -> None:
    if not GSM8K.is_dir():
        pytest.skip(f"no GSM8K files in {GSM8K}")
    tokenizer = build_tokenizer(1024)
    for line in (GSM8K / "test.jsonl").read_text(encoding="utf-8").splitlines()[:200]:
        question = json.loads(line)["question"]
        token_ids = tokenizer.encode(question, add_special_tokens=True)
        assert len(token_ids) == len(question)
        assert token_ids.count(tokenizer.unk_token_id) <= 0.05 * len(token_ids)


def test_a_starter_loads_with_transformers_and_holds_bfloat16(tmp_path: Path) -> None:
    build_starter(arithmetic(), tmp_path / "model", TINY, seed=0, max_length=64)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(weights)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 64
    assert tokenizer.decode(tokenizer.encode("47+85=\n")) == "47+85=\n"


def test_the_seed_decides_every_bit_and_the_process_is_left_as_it_was(tmp_path: Path) -> None:
    generator_state, num_threads = torch.get_rng_state(), torch.get_num_threads()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build_starter(arithmetic(), tmp_path / name, TINY, seed=seed, max_length=64)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    assert torch.equal(torch.get_rng_state(), generator_state)
    assert torch.get_num_threads() == num_threads


def test_rows_that_fill_the_context_teach_nothing_and_spoil_nothing(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    questions = ["x" * 500] * 40 + ["1+1="]
    rows.write_text("".join(json.dumps({"question": question, "answer": "2"}) + "\n" for question in questions))
    losses: list[float] = []
    task = build_task(jsonl_config(tmp_path, rows))
    build_starter(
        task, tmp_path / "model", TINY, seed=0, max_length=128, progress=lambda _, __, loss: losses.append(loss)
    )
    assert all(math.isfinite(loss) for loss in losses)


def test_rows_of_which_none_leaves_room_for_an_answer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"none of 2000 training rows.*model\.max_length = 8 characters"):
        build_starter(arithmetic(), tmp_path / "model", TINY, seed=0, max_length=8)
    assert not (tmp_path / "model").exists()


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(step: int, num_steps: int, loss: float) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_starter(arithmetic(), tmp_path / "model", TINY, seed=0, max_length=64, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_build_that_comes_second_keeps_the_first(tmp_path: Path) -> None:
    model = tmp_path / "model"

    def overtake(step: int, num_steps: int, loss: float) -> None:
        model.mkdir(exist_ok=True)
        (model / "first").touch()

    build_starter(arithmetic(), model, TINY, seed=0, max_length=64, progress=overtake)
    assert [path.name for path in model.iterdir()] == ["first"]
    assert list(tmp_path.iterdir()) == [model]


def test_the_path_depends_on_everything_that_decides_the_weights(tmp_path: Path) -> None:
    configs = [
        arithmetic_config(tmp_path),
        arithmetic_config(tmp_path, seed=1),
        arithmetic_config(tmp_path, max_length=65),
    ]
    paths = [starter_path(config, build_task(config)) for config in configs]
    assert len(set(paths)) == 3
    assert paths[0] == starter_path(configs[0], build_task(configs[0]))
    assert paths[0].parent == tmp_path / "models"


def test_rows_of_a_file_get_a_smoke_model_once(tmp_path: Path) -> None:
    train = tmp_path / "rows.jsonl"
    train.write_text('{"question": "What is the colour of the sky?", "answer": "blue"}\n' * 4)
    config = jsonl_config(tmp_path / "outputs", train)
    losses: list[float] = []
    task = build_task(config)
    assert recipe_for(task) == SMOKE
    folder = ensure_starter(config, task, progress=lambda step, num_steps, loss: losses.append(loss))
    assert len(losses) == SMOKE.num_steps
    assert losses[-1] < 0.5 * losses[0]
    assert ensure_starter(config, task, progress=lambda *_: pytest.fail("built twice")) == folder


class NoRows:
    def train_rows(self) -> Sequence[Row]:
        return []

    heldout_rows = train_rows

    def render(self, row: Row) -> str:
        return row.prompt

    def score(self, row: Row, completions: Sequence[str]) -> list:
        return []


def test_a_task_without_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="none of 0 training rows"):
        build_starter(NoRows(), tmp_path / "model", TINY, seed=0, max_length=64)


@pytest.mark.system
@pytest.mark.timeout(600)
def test_the_arithmetic_starter_is_right_often_enough_to_learn_from(tmp_path: Path) -> None:
    """Sampled accuracy of 0.3 to 0.45 on the demo's held-out rows, give or take two standard errors of 400 samples."""
    config = arithmetic_config(tmp_path)
    task = build_task(config)
    assert recipe_for(task) == ARITHMETIC
    folder = ensure_starter(config, task)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    accuracy = sampled_accuracy(model, tokenizer, task, num_samples=2, max_tokens=config.sampling.max_tokens)
    assert 0.25 <= accuracy <= 0.50


@torch.no_grad()
def sampled_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, task: Task, *, num_samples: int, max_tokens: int
) -> float:
    """Share of right answers at temperature 1 over the held-out rows, whose prompts are of one length."""
    rows = [row for row in task.heldout_rows() for _ in range(num_samples)]
    prompts = torch.tensor([tokenizer.encode(task.render(row)) for row in rows])
    torch.manual_seed(0)
    sequences: Tensor = model.generate(prompts, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=max_tokens)
    texts = tokenizer.batch_decode(sequences[:, prompts.shape[1] :], skip_special_tokens=True)
    return sum(score_arithmetic(row, [text])[0] for row, text in zip(rows, texts, strict=True)) / len(rows)


def test_a_full_disk_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    config = arithmetic_config(tmp_path)
    task = build_task(config)
    with full_disk(), pytest.raises(DiskError, match=r"starter cannot be written: .*; free disk space"):
        build_starter(task, tmp_path / "starter", TINY, seed=0, max_length=64)
    assert list(tmp_path.iterdir()) == []
