"""`python -m actors --redis-url redis://host:6379 --run-id x`: join a run."""

import logging
import os
import socket
import sys
import uuid

import typer

from actors.environment import prepare_environment
from lambdapo_async.cli.errors import run_main
from lambdapo_async.cli.options import ActorOverrides, DryRun, RedisUrl, RunName
from lambdapo_async.config.load import REDIS_URL_VARIABLE
from lambdapo_async.errors import ConfigError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def act(
    run_id: RunName,
    redis_url: RedisUrl = None,
    overrides: ActorOverrides = (),
    dry_run: DryRun = False,
) -> None:
    """Sample rollout groups for a run and follow its weights, until it ends or SIGTERM."""
    url = redis_url or os.environ.get(REDIS_URL_VARIABLE)
    if not url:
        raise ConfigError(f"no Redis: give --redis-url redis://host:6379 or set {REDIS_URL_VARIABLE}")
    actor_id = f"{socket.gethostname()[:64]}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    from actors.session import exit_on_signals, join_run, read_run  # redis and numpy only now

    if dry_run:
        _, config = read_run(url, run_id, overrides, publication_s=0.0)
        typer.echo(f"would join run {run_id} (model {config.model.path}, task {config.task.kind}) as {actor_id}")
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    exit_on_signals()
    run, config = read_run(url, run_id, overrides)
    join_run(run, config, run_id=run_id, actor_id=actor_id)


def main(arguments: list[str]) -> None:
    """What ``python -m actors`` does with its arguments; exits the process."""
    prepare_environment()
    run_main(app, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
