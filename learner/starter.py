"""The starter model: a small Qwen3 with a character tokenizer, built once from the run's own task.

For ``arithmetic`` it learns from demonstrations of which most hold a slip, so that it starts at 0.3 to 0.45 sampled
accuracy and reinforcement has something to find. For rows from a file it is a language model for smoke tests.

``python -m learner.starter configs/x.toml`` builds the one of a config.
"""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, count, islice
from pathlib import Path

import torch
import typer
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from lambdapo_async.cli.errors import run_main
from lambdapo_async.cli.options import ConfigPath, Overrides
from lambdapo_async.config import RunConfig, load_config
from lambdapo_async.durable import explaining_refusal, sync_tree
from lambdapo_async.errors import DiskError, TaskError
from lambdapo_async.tasks.arithmetic import Arithmetic, slipped_solution
from lambdapo_async.tasks.interface import Row, Task
from lambdapo_async.tasks.registry import build_task
from learner.character_tokenizer import build_tokenizer

Progress = Callable[[int, int, float], None]
"""(step, number of steps, loss in nats per token)"""
IGNORED = -100
"""Label of a position without loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What determines the weights, besides rows, seed and context."""

    num_steps: int
    batch_tokens: int = 1400
    lr: float = 5e-3
    warmup_steps: int = 10
    decay_share: float = 0.4
    """Last part of the steps, in which the learning rate falls to 0."""
    clean_steps: int = 165
    """First steps, without slips: the method is learned sooner from right working."""
    slip_rate: float = 0.75
    """Share of the later arithmetic demonstrations that have one wrong column."""
    hidden_size: int = 128
    intermediate_size: int = 1152
    """Wide and shallow: parameters are cheapest in large products, for learner and engine alike."""
    num_layers: int = 2
    num_heads: int = 4
    num_key_value_heads: int = 2
    head_size: int = 32
    """One of those that vLLM's CPU attention has a kernel for."""
    rope_theta: float = 100.0
    """Small, because contexts are: columns are found by distance."""
    initializer_range: float = 0.08
    """About 1 / sqrt(hidden_size): transformers' 0.02 wastes the first third of so short a training."""


ARITHMETIC = Recipe(num_steps=265)
SMOKE = Recipe(num_steps=20, intermediate_size=384)


def recipe_for(task: Task) -> Recipe:
    """The recipe that makes a good start for arithmetic, or one that is quick."""
    return ARITHMETIC if isinstance(task, Arithmetic) else SMOKE


def ensure_starter(config: RunConfig, task: Task, *, progress: Progress | None = None) -> Path:
    """Folder of the config's starter model, built (about 50 CPU seconds, on one core) unless it is there."""
    folder = starter_path(config, task)
    if not folder.is_dir():
        build_starter(
            task, folder, recipe_for(task), seed=config.seed, max_length=config.model.max_length, progress=progress
        )
    return folder


def starter_path(config: RunConfig, task: Task) -> Path:
    """``output_dir/models/starter-<digest of everything that determines the weights>``."""
    determinants = {
        "recipe": asdict(recipe_for(task)),
        "rows": [(task.render(row), row.answer, row.solution) for row in task.train_rows()],
        "seed": config.seed,
        "max_length": config.model.max_length,
        "torch": torch.__version__,
    }
    digest = hashlib.sha256(json.dumps(determinants, sort_keys=True).encode()).hexdigest()
    return config.output_dir / "models" / f"starter-{digest[:16]}"


def build_starter(
    task: Task, folder: Path, recipe: Recipe, *, seed: int, max_length: int, progress: Progress | None = None
) -> None:
    """Train a starter for ``task`` on one core and write it to ``folder``, whole or not at all.

    Args:
        task: its training rows are the demonstrations; the held-out ones are never seen.
        recipe: model size and training.
        folder: gets config, bfloat16 weights, tokenizer and generation config in Hugging Face's format.
        seed: decides the weights, to the bit on one machine.
        max_length: the model's context in tokens (= characters).
        progress: called after each step.

    Raises:
        DiskError: the disk refused.
    """
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    with explaining_refusal(folder, DiskError):
        folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        tokenizer = build_tokenizer(max_length)
        with _one_seeded_core(seed):
            model = _new_model(recipe, tokenizer, max_length)
            _train(model, _curriculum(task, tokenizer, recipe, random.Random(seed)), recipe, progress)
        # Learner and actors must agree on version 0, so it holds nothing that bfloat16 cannot.
        with explaining_refusal(folder, DiskError):
            model.to(torch.bfloat16).save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            sync_tree(partial)
            _move_into_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _move_into_place(partial: Path, folder: Path) -> None:
    """The commit point; a process that was faster has built the same model."""
    try:
        os.rename(partial, folder)
    except OSError:
        if not folder.is_dir():
            raise


@contextmanager
def _one_seeded_core(seed: int) -> Iterator[None]:
    """torch on one thread (sums in one order) from ``seed``; threads and generator are restored afterwards."""
    num_threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            torch.set_num_threads(num_threads)


def _new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, max_length: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_key_value_heads,
        head_dim=recipe.head_size,
        max_position_embeddings=max_length,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        initializer_range=recipe.initializer_range,
        tie_word_embeddings=False,  # vLLM on a CPU does not reload tied weights
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen3ForCausalLM(config)


def _train(
    model: Qwen3ForCausalLM, batches: Iterator[tuple[Tensor, Tensor]], recipe: Recipe, progress: Progress | None
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, recipe))
    for step in range(1, recipe.num_steps + 1):
        input_ids_BL, labels_BL = next(batches)
        logits_BLV = model(input_ids=input_ids_BL).logits
        loss = functional.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), labels_BL[:, 1:].flatten())
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if progress is not None:
            progress(step, recipe.num_steps, loss.item())


def _lr_factor(step: int, recipe: Recipe) -> float:
    """Linear warm-up, plateau, linear decay."""
    remaining = (recipe.num_steps - step) / (recipe.decay_share * recipe.num_steps)
    return min(1.0, (step + 1) / recipe.warmup_steps, remaining)


def _curriculum(
    task: Task, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, source: random.Random
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of right demonstrations, then endless ones of which some hold a slip."""
    right, slipped = (
        _batches(
            _demonstrations(task, slip_rate, source, max_length=tokenizer.model_max_length),
            tokenizer,
            batch_tokens=recipe.batch_tokens,
        )
        for slip_rate in (0.0, recipe.slip_rate)
    )
    return chain(islice(right, recipe.clean_steps), slipped)


def _batches(
    demonstrations: Iterator[tuple[str, str]], tokenizer: PreTrainedTokenizerFast, *, batch_tokens: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Right-padded batches: [B, L] int64 token ids and labels, B L <= ``batch_tokens`` (or B = 1)."""
    batch: list[tuple[list[int], int]] = []
    longest = 0
    for prompt, completion in demonstrations:
        prompt_ids, completion_ids = (tokenizer.encode(text, add_special_tokens=False) for text in (prompt, completion))
        token_ids = [*prompt_ids, *completion_ids, tokenizer.eos_token_id][: tokenizer.model_max_length]
        if batch and (len(batch) + 1) * max(longest, len(token_ids)) > batch_tokens:
            yield _padded(batch, longest, pad=tokenizer.pad_token_id)
            batch, longest = [], 0
        batch.append((token_ids, len(prompt_ids)))
        longest = max(longest, len(token_ids))


def _padded(batch: Sequence[tuple[list[int], int]], length: int, *, pad: int) -> tuple[Tensor, Tensor]:
    """No mask is needed: causality hides padding on the right."""
    input_ids_BL = torch.full((len(batch), length), pad)
    labels_BL = torch.full((len(batch), length), IGNORED)
    for row, (token_ids, num_prompt_tokens) in enumerate(batch):
        ids = torch.tensor(token_ids)
        input_ids_BL[row, : len(ids)] = ids
        labels_BL[row, num_prompt_tokens : len(ids)] = ids[num_prompt_tokens:]
    return input_ids_BL, labels_BL


def _demonstrations(
    task: Task, slip_rate: float, source: random.Random, *, max_length: int
) -> Iterator[tuple[str, str]]:
    """Endless (prompt, completion) pairs: training rows in a new order each epoch.

    A batch of prompts alone has no loss, and its mean, NaN, would spoil the model: rows that fill the context are left
    out.
    """
    all_rows = task.train_rows()
    rows = [row for row in all_rows if len(task.render(row)) < max_length]
    if not rows:
        raise TaskError(
            f"none of {len(all_rows)} training rows leaves room for an answer in model.max_length = {max_length} "
            "characters, so no starter model can be built from them: raise it"
        )
    for _ in count():
        source.shuffle(rows)
        for row in rows:
            yield task.render(row), _completion(task, row, slip_rate, source)


def _completion(task: Task, row: Row, slip_rate: float, source: random.Random) -> str:
    if isinstance(task, Arithmetic) and source.random() < slip_rate:
        return slipped_solution(row, source)
    return row.answer if row.solution is None else row.solution


def is_worth_a_line(step: int, num_steps: int) -> bool:
    """Whether a step of the building is shown: a line every few seconds is enough."""
    return step % 20 == 0 or step == num_steps


def build(config_path: ConfigPath, overrides: Overrides = ()) -> None:
    """Build the starter model of a config and print its folder."""
    config = load_config(config_path, overrides)
    task = build_task(config)
    typer.echo(ensure_starter(config, task, progress=_echo_progress))


def _echo_progress(step: int, num_steps: int, loss: float) -> None:
    if is_worth_a_line(step, num_steps):
        typer.echo(f"step {step}/{num_steps} loss {loss:.3f}", err=True)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(build)

if __name__ == "__main__":
    run_main(app)
