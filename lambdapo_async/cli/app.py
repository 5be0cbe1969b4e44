"""The ``lambdapo`` command: everything that a person starts."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from lambdapo_async.cli.errors import RUN_ERROR_STATUS, USER_ERROR_STATUS, run_main
from lambdapo_async.cli.options import ConfigPath, DryRun, Overrides, RedisUrl, RunId, RunName
from lambdapo_async.config import load_config
from lambdapo_async.errors import ConfigError

DEMO_CONFIG = Path("configs/arithmetic_demo.toml")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Asynchronous, streaming, off-policy RL for language models.",
)
_PASSED_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@app.command(context_settings=_PASSED_ON, add_help_option=False)
def learner(context: typer.Context) -> None:
    """Start the learner of a run, or go on with it (= python -m learner)."""
    _become("learner", context.args)


@app.command(context_settings=_PASSED_ON, add_help_option=False)
def actor(context: typer.Context) -> None:
    """Start an actor that joins a run (= python -m actors)."""
    _become("actors", context.args)


@app.command(context_settings=_PASSED_ON, add_help_option=False)
def export(context: typer.Context) -> None:
    """Write a checkpoint as a Hugging Face model (= python -m learner.export)."""
    _become("learner.export", context.args)


@app.command(context_settings=_PASSED_ON, add_help_option=False)
def replay(context: typer.Context) -> None:
    """Train on a recorded run again, with any loss settings, without Redis or actors (= python -m learner.replay)."""
    _become("learner.replay", context.args)


@app.command(context_settings=_PASSED_ON, add_help_option=False)
def weights(context: typer.Context) -> None:
    """Look into the weight versions of a run, prove or export them (= python -m lambdapo_async.cli.weights)."""
    _become("lambdapo_async.cli.weights", context.args)


@app.command()
def actors(run_id: RunName, redis_url: RedisUrl = None) -> None:
    """Show who takes part in a run: state, device, engine, version, speed, and what each has counted."""
    from lambdapo_async.cli.actors import print_actors
    from lambdapo_async.cli.open_run import open_run

    with open_run(run_id, redis_url) as run:
        print_actors(run.fleet.members(), Console())


@app.command()
def demo(
    config_path: Annotated[
        Path, typer.Option("--config", metavar="CONFIG", help="TOML file; it must name evaluation.target.")
    ] = DEMO_CONFIG,
    run_id: RunId = None,
    overrides: Overrides = (),
    num_actors: Annotated[int, typer.Option("--actors", metavar="N", min=1, help="Actors to start.")] = 2,
    dry_run: DryRun = False,
) -> None:
    """Run Redis, a learner and actors on this machine until the held-out reward is reached, killing an actor half-way.

    Exits with 0 only when it was reached.
    """
    from lambdapo_async.cli.demo import plan_demo, print_summary, run_demo
    from lambdapo_async.report.page import write_report

    plan = plan_demo(config_path, tuple(overrides), run_id=run_id, num_actors=num_actors)
    if dry_run:
        typer.echo(plan.describe())
        return
    console = Console()
    summary = run_demo(plan, console)
    print_summary(summary, console)
    typer.echo(f"report: {write_report(plan.folder)}")
    if not summary.is_target_reached:
        raise typer.Exit(RUN_ERROR_STATUS)


@app.command()
def config(config_path: ConfigPath, overrides: Overrides = (), dry_run: DryRun = False) -> None:
    """Check a config and print it resolved, as JSON, without the password of broker.url."""
    from lambdapo_async.broker.connection import redact

    resolved = load_config(config_path, overrides)
    if dry_run:
        typer.echo(f"{config_path} is a valid config")
        return
    tree = resolved.model_dump(mode="json")
    tree["broker"]["url"] = redact(resolved.broker.url)
    typer.echo(json.dumps(tree, indent=2))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A run's folder, outputs/RUN_ID.")],
    dry_run: DryRun = False,
) -> None:
    """Write report.html from the files in a run's folder."""
    from lambdapo_async.report.page import write_report
    from lambdapo_async.report.run_folder import read_run

    if dry_run:
        typer.echo(f"would report {len(read_run(folder).rows)} rows of {folder}")
        return
    typer.echo(str(write_report(folder)))


@app.command()
def doctor(
    url: Annotated[str, typer.Argument(metavar="URL", help="redis://, rediss:// or unix://")],
    config_path: Annotated[
        Path | None, typer.Option("--config", metavar="CONFIG", help="TOML file whose broker.max_bytes must fit.")
    ] = None,
    overrides: Overrides = (),
) -> None:
    """Check how a Redis is set up: one line per finding and what to change; exits with 2 if anything is wrong."""
    from lambdapo_async.cli.doctor import diagnose
    from lambdapo_async.config.sections import BrokerConfig

    if overrides and config_path is None:
        raise ConfigError("--set changes a value of the config that --config names: give both")
    broker = BrokerConfig() if config_path is None else load_config(config_path, overrides).broker
    if not diagnose(url, max_bytes=broker.max_bytes):
        raise typer.Exit(USER_ERROR_STATUS)


def main() -> NoReturn:
    """Entry point of the installed command."""
    run_main(app)


def _become(module: str, arguments: list[str]) -> NoReturn:
    """Replace this process by ``python -m module``: signals and the exit code are its own from here on."""
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


if __name__ == "__main__":
    main()
