"""Arguments that several commands share, each declared once."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.models import OptionInfo

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
"""What can be a folder's name, and a part of a Redis key that means nothing else."""


def _checked_run_id(run_id: str | None) -> str | None:
    if run_id is not None and not _RUN_ID.fullmatch(run_id):
        raise typer.BadParameter("use 1 to 96 letters, digits, '.', '_' or '-', beginning with a letter or digit")
    return run_id


ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="TOML file of the run; the shipped ones are in configs/.")
]
RunId = Annotated[
    str | None,
    typer.Option(
        "--run-id",
        metavar="ID",
        callback=_checked_run_id,
        help="Name of the run in Redis and of its folder; default: name and time.",
    ),
]
RunName = Annotated[
    str,
    typer.Option("--run-id", metavar="ID", callback=_checked_run_id, help="The run, as its learner names it."),
]
RedisUrl = Annotated[
    str | None,
    typer.Option("--redis-url", metavar="URL", help="redis://, rediss:// or unix://; default: REDIS_URL."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check what can be, say what would happen, do nothing.")]


def _set_option(help_text: str) -> OptionInfo:
    help_text = f"{help_text}; may be repeated."
    option: OptionInfo = typer.Option("--set", metavar="KEY=VALUE", show_default=False, help=help_text)
    return option


if TYPE_CHECKING:
    Overrides = Sequence[str]  # so that `= ()` is a default; typer itself knows lists only
    ActorOverrides = Sequence[str]
else:
    Overrides = Annotated[list[str], _set_option("Override one config value, for example learner.lr=1e-6")]
    ActorOverrides = Annotated[
        list[str], _set_option("Override one actor.* value of the run's config, for example actor.max_num_seqs=64")
    ]
