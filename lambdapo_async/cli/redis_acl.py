"""`scripts/redis-acl`: prints the Redis users of a run."""

from typing import Annotated

import typer

from lambdapo_async.broker.acl import FIRST_WITH_READ_ONLY_KEYS, ROLES, rules
from lambdapo_async.broker.connection import OLDEST
from lambdapo_async.cli.errors import run_main

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def print_rules(
    run_id: Annotated[str, typer.Argument(metavar="RUN_ID", help="A run's id; * is every run.")] = "*",
    redis_major: Annotated[
        int, typer.Option("--redis", metavar="VERSION", min=OLDEST[0], help="The server's major version.")
    ] = FIRST_WITH_READ_ONLY_KEYS,
) -> None:
    """Print the commands that make the two users, and an administrator before they close the default user.

    Put passwords in place of the words in capitals.
    """
    for role in ROLES:
        quoted = " ".join(rules(role, run_id, redis_major=redis_major))
        typer.echo(f"ACL SETUSER lambdapo-{role} {quoted} >{role.upper()}-PASSWORD")
    typer.echo("ACL SETUSER lambdapo-admin on ~* &* +@all >ADMIN-PASSWORD")
    typer.echo("ACL SETUSER default off")


if __name__ == "__main__":
    run_main(app)
