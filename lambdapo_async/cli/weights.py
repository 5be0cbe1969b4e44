"""``lambdapo weights``: what a run has published, what changed, and any kept version as a Hugging Face checkpoint."""

import contextlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.cli.errors import run_main
from lambdapo_async.cli.open_run import open_run
from lambdapo_async.cli.options import RedisUrl, RunName
from lambdapo_async.config.load import parse_published
from lambdapo_async.durable import explaining_refusal
from lambdapo_async.errors import DiskError, WeightsError
from lambdapo_async.weights.adapter import is_adapter, merged_state
from lambdapo_async.weights.catch_up import Available
from lambdapo_async.weights.delta_file import DeltaMetadata
from lambdapo_async.weights.hf_folder import check_target, write_hf_folder
from lambdapo_async.weights.history import WeightHistory
from lambdapo_async.weights.inspect import (
    LayerChange,
    compare_states,
    layer_of,
    reconstruct,
    total_change,
    verify,
)
from lambdapo_async.weights.state import State

_THREADS = 4

Version = Annotated[int, typer.Argument(metavar="V", min=0, help="Policy version.")]
ByTensor = Annotated[bool, typer.Option("--tensors", help="A line per tensor instead of one per layer.")]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Look into the weight versions of a run, prove them, export them.",
)


@app.command()
def ls(run_id: RunName, redis_url: RedisUrl = None) -> None:
    """Every file that can be fetched: kind, where it leads from and to, size."""
    with _open_history(run_id, redis_url) as (run, history):
        head = run.weights.head()
    whole = max((file.num_bytes for file in history.files if file.base_version is None), default=0)
    table = Table("version", "kind", "from", _right("bytes"), _right("of a full file"), "")
    for file in history.files:
        share = f"{file.num_bytes / whole:.2%}" if whole else "-"
        mark = "head" if file.version == head else ""
        table.add_row(str(file.version), _kind(file), _bases(file), f"{file.num_bytes:,}", share, mark)
    console = Console()
    console.print(table)
    console.print(f"{len(history.files)} files, {sum(file.num_bytes for file in history.files):,} bytes; head {head}")


@app.command()
def show(version: Version, run_id: RunName, redis_url: RedisUrl = None, tensors: ByTensor = False) -> None:
    """One version: its files, and what it changed of the version before, by layer."""
    console = Console()
    with _open_history(run_id, redis_url) as (_, history):
        state = reconstruct(history, version)
        console.print(f"version {version}: {len(state.tensors)} tensors, {state.numel:,} elements")
        metadata = {file: history.delta(file).metadata for file in history.files if _is_delta_to(file, version)}
        for file in (file for file in history.files if file.version == version):
            console.print(
                f"  {_kind(file)} from {_bases(file)}, {file.num_bytes:,} bytes{_encoding(metadata.get(file))}"
            )
        step = next((file for file in metadata if file.base_min is None), None)
        if step is None or step.base_version not in history.versions():
            console.print("  no step leads here, so what it changed is not known")
            return
        before = reconstruct(history, step.base_version)
    console.print(_changes(compare_states(before, state, part_of=str if tensors else layer_of)))


@app.command()
def diff(
    old: Annotated[int, typer.Argument(metavar="A", min=0, help="Policy version.")],
    new: Annotated[int, typer.Argument(metavar="B", min=0, help="Policy version.")],
    run_id: RunName,
    redis_url: RedisUrl = None,
    tensors: ByTensor = False,
) -> None:
    """Share of changed elements and largest change between two versions, by layer."""
    with _open_history(run_id, redis_url) as (_, history):
        layers = compare_states(
            reconstruct(history, old), reconstruct(history, new), part_of=str if tensors else layer_of
        )
    Console().print(_changes(layers))


@app.command()
def export(
    version: Version,
    target: Annotated[Path, typer.Option("--to", metavar="DIR", help="Folder to write; it must not exist.")],
    run_id: RunName,
    redis_url: RedisUrl = None,
) -> None:
    """Write one version as a Hugging Face checkpoint, adapters merged."""
    check_target(target)
    with _open_history(run_id, redis_url) as (run, history):
        state = _model_of(reconstruct(history, version), run, run_id)
        model_files = run.run_store.model_files()
    with explaining_refusal(target, DiskError):
        write_hf_folder(target, state, model_files)
    typer.echo(f"version {version} of {run_id} exported to {target}")


@app.command("verify")
def verify_all(run_id: RunName, redis_url: RedisUrl = None) -> None:
    """Fetch every file and prove that all ways to a version end in the same bits; status 1 if they do not."""
    with _open_history(run_id, redis_url) as (_, history):
        found = verify(history)
    versions = ", ".join(map(str, found.versions)) or "none"
    typer.echo(f"{found.num_files} files, {found.num_bytes:,} bytes, {found.num_steps} steps; versions {versions}")
    for problem in found.problems:
        typer.echo(f"  {problem}", err=True)
    if found.problems:
        raise WeightsError(f"{len(found.problems)} problems in the weights of run {run_id}")
    typer.echo("every version is the same by every way")


def _model_of(state: State, run: RedisRun, run_id: str) -> State:
    """The version as one model: with its adapters, if it has some, merged into it."""
    if not any(is_adapter(name) for name in state.tensors):
        return state
    lora = parse_published(run.run_store.config_json(), run_id=run_id).learner.lora
    if lora is None:
        raise WeightsError(f"version {state.version} has adapters, and the config of run {run_id} no learner.lora")
    return merged_state(state, lora)


@contextlib.contextmanager
def _open_history(run_id: str, redis_url: str | None) -> Iterator[tuple[RedisRun, WeightHistory]]:
    with open_run(run_id, redis_url) as run, ThreadPoolExecutor(_THREADS) as pool:
        yield run, WeightHistory(run.weights, run_id=run_id, pool=pool)


def _is_delta_to(file: Available, version: int) -> bool:
    return file.version == version and file.base_version is not None


def _kind(file: Available) -> str:
    if file.base_version is None:
        return "full"
    return "step" if file.base_min is None else "union"


def _bases(file: Available) -> str:
    bases = file.bases()
    if bases is None:
        return "nothing"
    return str(bases[0]) if len(bases) == 1 else f"{bases[0]} to {bases[-1]}"


def _encoding(metadata: DeltaMetadata | None) -> str:
    if metadata is None:
        return ""
    return f", {metadata.encoding}, {metadata.changed / max(1, metadata.numel):.2%} changed"


def _changes(layers: Mapping[str, LayerChange]) -> Table:
    total = total_change(layers)
    table = Table(
        "", _right("elements"), _right("changed"), _right("share"), _right("largest change"), show_footer=True
    )
    for column, text in zip(table.columns, _row("all", total), strict=True):
        column.footer = text
    for name, layer in layers.items():
        table.add_row(*_row(name, layer))
    return table


def _row(name: str, layer: LayerChange) -> tuple[str, ...]:
    return name, f"{layer.numel:,}", f"{layer.changed:,}", f"{layer.share:.3%}", f"{layer.max_change:.3g}"


def _right(header: str) -> Column:
    return Column(header, justify="right")


if __name__ == "__main__":
    run_main(app)
