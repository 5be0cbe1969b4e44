"""``lambdapo actors``: who takes part in a run, on what, how fast, and what went wrong there."""

from collections import Counter
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table

from lambdapo_async.broker.heartbeat import Heartbeat

_ANY_WIDTH = 10_000


def print_actors(members: Sequence[Heartbeat], console: Console) -> None:
    """A line per actor, then every counter that any of them has."""
    if not members:
        console.print("no actor takes part now")
        return
    _print_whole(_table_of(sorted(members, key=lambda member: member.actor_id)), console)
    speed = sum(member.tokens_per_s for member in members)
    states = Counter(member.state for member in members)
    told = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    console.print(f"{len(members)} {'actor' if len(members) == 1 else 'actors'} ({told}), {speed:,.0f} tokens/s")
    if any(value for member in members for value in member.counters.values()):
        _print_whole(_counters_of(members), console)


def _print_whole(table: Table, console: Console) -> None:
    """At its full width: a terminal that is narrower breaks lines, but no cell is cut short."""
    table.box = box.SIMPLE_HEAD
    width = Measurement.get(console, console.options.update(max_width=_ANY_WIDTH), table).maximum
    Console(file=console.file, width=width).print(table, crop=False)


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
        table.add_row(name, _shown(total), _shown(most.counters[name]), most.actor_id)
    return table


def _shown(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _right(header: str) -> Column:
    return Column(header, justify="right")
