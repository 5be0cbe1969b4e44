"""``lambdapo actors``: who takes part in a run, on what, how fast, and what went wrong there."""

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Column, Table

from lambdapo_async.broker.heartbeat import Heartbeat


def print_actors(members: Sequence[Heartbeat], console: Console) -> None:
    """A line per actor, then every counter that any of them has."""
    console.print(_table_of(sorted(members, key=lambda member: member.actor_id)))
    speed = sum(member.tokens_per_s for member in members)
    states = Counter(member.state for member in members)
    told = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    console.print(f"{len(members)} actors{told and f' ({told})'}, {speed:,.0f} tokens/s")
    if any(value for member in members for value in member.counters.values()):
        console.print(_counters_of(members))


def _table_of(members: Sequence[Heartbeat]) -> Table:
    table = Table(
        "actor", "state", "host:pid", "device", "dtype", "engine", _right("version"), _right("in flight"),
        _right("groups sent"), _right("rollouts"), _right("tokens"), _right("tokens/s"), _right("idle"),
    )  # fmt: skip
    for one in members:
        table.add_row(
            one.actor_id, one.state, f"{one.host}:{one.pid}", one.device, one.dtype, one.engine,
            str(one.policy_version), str(one.groups_in_flight), f"{one.groups_sent:,}", f"{one.completions:,}",
            f"{one.tokens:,}", f"{one.tokens_per_s:,.0f}", f"{one.idle_share:.0%}",
        )  # fmt: skip
    return table


def _counters_of(members: Sequence[Heartbeat]) -> Table:
    """Sum and largest of what is not 0, since each actor started."""
    table = Table("counter", _right("all actors"), _right("most"), "of")
    for name in sorted({name for member in members for name, value in member.counters.items() if value}):
        most = max(members, key=lambda member: member.counters.get(name, 0.0))
        total = sum(member.counters.get(name, 0.0) for member in members)
        table.add_row(name, f"{total:,.6g}", f"{most.counters[name]:,.6g}", most.actor_id)
    return table


def _right(header: str) -> Column:
    return Column(header, justify="right")
