"""`python -m learner configs/x.toml`: start the learner of a run, or go on with it."""

import datetime
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from lambdapo_async.cli.errors import run_main
from lambdapo_async.cli.options import ConfigPath, DryRun, Overrides, RedisUrl, Resume, RunId
from lambdapo_async.config import RunConfig, load_config
from lambdapo_async.errors import ConfigError
from lambdapo_async.parent_death import die_with_parent

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, slots=True)
class Launch:
    """A learner that is about to start."""

    config: RunConfig
    run_id: str
    resume: bool

    @property
    def folder(self) -> Path:
        """Everything the run writes."""
        return self.config.output_dir / self.run_id


@app.command()
def learn(
    config_path: ConfigPath,
    run_id: RunId = None,
    overrides: Overrides = (),
    redis_url: RedisUrl = None,
    resume: Resume = False,
    dry_run: DryRun = False,
) -> None:
    """Train the policy of a run: read rollout groups, take optimizer steps, publish weight versions."""
    # torchrun numbers its processes; only the first one talks, and may find the folder as it expects it.
    is_first = int(os.environ.get("RANK", "0")) == 0
    launch = _launch(config_path, run_id, overrides, redis_url, resume=resume, is_first=is_first)
    if dry_run:
        typer.echo(_describe(launch))
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(os.getppid())  # torchrun gives each process a session of its own
    level = logging.INFO if is_first else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    from learner.session import run_learner  # torch and transformers only once the config is known to be right

    run_learner(launch.config, run_id=launch.run_id, folder=launch.folder, resume=resume)


def _launch(
    config_path: Path,
    run_id: str | None,
    overrides: Sequence[str],
    redis_url: str | None,
    *,
    resume: bool,
    is_first: bool,
) -> Launch:
    """Everything that can be wrong is found here, before Redis, a GPU or a model is touched."""
    if redis_url is not None:
        overrides = [*overrides, f"broker.url={redis_url}"]
    config = load_config(config_path, overrides)
    if resume and run_id is None:
        raise ConfigError(f"--resume needs --run-id; {_runs_of(config)}")
    launch = Launch(config, run_id or _new_run_id(config), resume)
    if not is_first:
        return launch
    has_checkpoint = any((launch.folder / "checkpoints").glob("step-*"))
    if resume and not has_checkpoint:
        raise ConfigError(f"--resume: {launch.folder} holds no checkpoint; {_way_out(launch)}")
    if has_checkpoint and not resume:
        raise ConfigError(
            f"{launch.folder} already holds a run: add --resume to go on with it, or choose another --run-id"
        )
    return launch


def _describe(launch: Launch) -> str:
    """What would be started.

    Raises:
        BrokerRefusedError: ``broker.url`` is no Redis URL; whether it answers is not asked.
        ConfigError: an objective of the user's own cannot be imported.
        TaskError: the task's rows or rewards cannot be read.
    """
    from lambdapo_async.broker.connection import connect
    from lambdapo_async.objective.resolve import resolve_objective
    from lambdapo_async.tasks.registry import build_task  # reward functions only now

    connect(launch.config.broker.url, timeout_s=launch.config.broker.timeout_s).close()
    resolve_objective(launch.config)
    task = build_task(launch.config)
    rows = f"{len(task.train_rows())} training and {len(task.heldout_rows())} held-out rows"
    return f"would {'resume' if launch.resume else 'start'} run {launch.run_id} in {launch.folder} on {rows}"


def _new_run_id(config: RunConfig) -> str:
    return f"{config.name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


def _way_out(launch: Launch) -> str:
    if (launch.folder / "checkpoints").is_dir():
        return "its learner ended before it had written the first one, so nothing is lost: start it without --resume"
    return _runs_of(launch.config)


def _runs_of(config: RunConfig) -> str:
    folders = sorted({folder.parents[1].name for folder in config.output_dir.glob("*/checkpoints/step-*")})
    return f"runs in {config.output_dir}: {', '.join(folders[-8:])}" if folders else f"{config.output_dir} holds no run"


if __name__ == "__main__":
    run_main(app)
