"""A checkpoint as a model that any program reads: Hugging Face's layout, LoRA merged.

``lambdapo export RUN_FOLDER --to DIR`` is this module's command.
"""

import os
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from lambdapo_async.cli.errors import run_main
from lambdapo_async.cli.options import DryRun
from lambdapo_async.durable import explaining_refusal, sync, sync_tree, whole_or_gone
from lambdapo_async.errors import CheckpointError, ConfigError, DiskError
from learner.checkpoint import CheckpointStore
from learner.lora import merge_folder
from learner.model_folder import CONFIG_FILE, ModelSource, companion_files

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def export_model(model_dir: Path, target: Path, *, dtype: torch.dtype) -> None:
    """Write weights, config, tokenizer and generation config; ``target`` appears complete or not at all.

    Args:
        model_dir: of a checkpoint: a whole model, or adapters and the path of theirs.

    Raises:
        ConfigError: ``target`` exists, or the model cannot be read.
        CheckpointError, DiskError: the disk refused ``target``.
    """
    check_target(target)
    source = ModelSource.locate(str(model_dir), None)
    # Merged in float32: an adapter may move a weight by less than bfloat16 resolves.
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    if source.adapter is not None:
        merge_folder(model, source.adapter)
    with explaining_refusal(target, DiskError):
        partial = Path(tempfile.mkdtemp(prefix=f"partial-{target.name}-", dir=target.parent))
    with whole_or_gone(partial, target):
        model.to(dtype).save_pretrained(partial)
        for name, content in companion_files(source.folder).items():
            if name != CONFIG_FILE:  # the one just written knows the new dtype
                (partial / name).write_bytes(content)
        partial.chmod(0o755)
        sync_tree(partial)
        os.rename(partial, target)
        sync(target.parent)


def check_target(target: Path) -> None:
    """Refuse to write over anything, or into a folder that is not there.

    Raises:
        ConfigError: with what to change.
    """
    if target.exists():
        raise ConfigError(f"{target} exists already: name a folder that does not")
    if not target.absolute().parent.is_dir():
        raise ConfigError(f"{target.absolute().parent} is no folder: create it first")


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
