"""A checkpoint as a model that any program reads: Hugging Face's layout, LoRA merged.

``lambdapo export RUN_FOLDER --to DIR`` is this module's command.
"""

import os
import tempfile
import uuid
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils import logging as transformers_logging

from lambdapo_async.cli.errors import run_main
from lambdapo_async.cli.options import DryRun
from lambdapo_async.durable import sync, sync_tree, whole_or_gone
from lambdapo_async.errors import CheckpointError
from lambdapo_async.weights.hf_folder import check_target
from learner.checkpoint import CheckpointStore
from learner.model_folder import CONFIG_FILE, ModelSource, companion_files
from learner.model_loading import load_frozen_model, weight_dtype

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def export_model(model_dir: Path, target: Path, *, dtype: torch.dtype) -> None:
    """Write weights, config, tokenizer and generation config; ``target`` appears complete or not at all.

    Args:
        model_dir: of a checkpoint: a whole model, or adapters and the path of theirs.

    Raises:
        ConfigError: ``target`` exists, or the model cannot be read.
        CheckpointError: adapters of another model, or the disk refused; nothing is left of ``target``.
    """
    check_target(target)
    source = ModelSource.locate(str(model_dir), None)
    # Merged in float32, a CPU's type: an adapter may move a weight by less than bfloat16 resolves.
    model = load_frozen_model(source, torch.device("cpu"))
    # The model's own is copied as it is: transformers reads some that it refuses to write. Where there is none it makes
    # one of config.json, but not beside an empty one.
    model.generation_config = GenerationConfig()
    partial = target.with_name(f"partial-{target.name}-{uuid.uuid4().hex}")
    with whole_or_gone(partial, target):
        partial.mkdir()
        for name, tensor in chain(model.named_parameters(), model.named_buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.to(weight_dtype(model, name, dtype))
        model.save_pretrained(partial)
        (partial / GENERATION_CONFIG_NAME).unlink(missing_ok=True)
        for name, content in companion_files(source.folder).items():
            if name != CONFIG_FILE:  # the one just written knows the new dtype
                (partial / name).write_bytes(content)
        sync_tree(partial)
        os.rename(partial, target)
        sync(target.absolute().parent)


def find_model(run_folder: Path, step: int | None) -> Path:
    """The model of the newest whole checkpoint, or of the newest whole one of ``step``; its checksums are compared.

    Raises:
        CheckpointError: there is none.
    """
    checkpoints = run_folder / "checkpoints"
    if step is None:
        found = CheckpointStore(checkpoints).load_latest()
        if found is None:
            raise CheckpointError(f"{run_folder} holds no checkpoint")
        return found.model_dir
    with tempfile.TemporaryDirectory() as view:
        for folder in checkpoints.glob(f"step-{step:08d}.*"):
            (Path(view) / folder.name).symlink_to(folder.absolute())
        found = CheckpointStore(Path(view)).load_latest()
        if found is None:
            steps = sorted({int(folder.name[5:13]) for folder in checkpoints.glob("step-*")})
            raise CheckpointError(f"{run_folder} holds no checkpoint of step {step}, only of {steps}")
        return found.model_dir.resolve()


def export(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN_FOLDER", help="A run's folder, outputs/RUN_ID.")],
    target: Annotated[Path, typer.Option("--to", metavar="DIR", help="Folder to write; it must not exist.")],
    step: Annotated[int | None, typer.Option("--step", metavar="N", min=0, help="Default: the newest.")] = None,
    dtype: Annotated[Literal["bfloat16", "float32"], typer.Option("--dtype", help="Type of the weights.")] = "bfloat16",
    dry_run: DryRun = False,
) -> None:
    """Write a checkpoint's model in Hugging Face's format, LoRA merged."""
    transformers_logging.disable_progress_bar()
    check_target(target)
    model_dir = find_model(run_folder, step)
    if dry_run:
        typer.echo(f"would export {model_dir} to {target} in {dtype}")
        return
    export_model(model_dir, target, dtype=DTYPES[dtype])
    typer.echo(f"{model_dir} exported to {target} in {dtype}")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(export)

if __name__ == "__main__":
    run_main(app)
