"""Arguments that several commands share, each declared once."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="TOML file of the run; the shipped ones are in configs/.")
]
RunId = Annotated[
    str | None,
    typer.Option("--run-id", metavar="ID", help="Name of the run in Redis and of its folder; default: name and time."),
]
RunName = Annotated[str, typer.Option("--run-id", metavar="ID", help="The run, as its learner names it.")]
RedisUrl = Annotated[
    str | None,
    typer.Option("--redis-url", metavar="URL", help="redis://, rediss:// or unix://; default: REDIS_URL."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would happen, start nothing.")]

if TYPE_CHECKING:
    Overrides = Sequence[str]  # so that `= ()` is a default; typer itself knows lists only
else:
    Overrides = Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            show_default=False,
            help="Override one config value, for example learner.lr=1e-6; may be repeated.",
        ),
    ]
