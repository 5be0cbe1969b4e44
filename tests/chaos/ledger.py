"""What every process of a run did, in files that survive kill -9.

Each process appends to a file of its own, one ``write`` per line (O_APPEND: a killed process leaves whole lines or one
torn one at the end).
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Field = int | float | str | None | list["Field"] | dict[str, "Field"]
What = Literal[
    "started", "leased", "handed_back", "offered", "received", "discarded", "used", "claimed", "opened", "step",
    "checkpoint", "resumed", "published", "adopted", "committed", "initialised", "sampled", "attempted", "fault",
    "dying", "ended",
]  # fmt: skip
SUFFIX = ".ledger"


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that one process did."""

    at_ns: int
    """CLOCK_MONOTONIC, which all processes of a machine share."""
    who: str
    what: What
    fields: Mapping[str, Field]


class Ledger:
    """One process's file."""

    def __init__(self, folder: Path, who: str) -> None:
        self._who = who
        self._file = os.open(folder / f"{who}{SUFFIX}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, what: What, **fields: Field) -> None:
        line = json.dumps([time.monotonic_ns(), self._who, what, fields], separators=(",", ":"))
        os.write(self._file, line.encode() + b"\n")


def read_ledger(folder: Path) -> list[Entry]:
    """Every whole line of every process, in order of time."""
    entries = []
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        lines = path.read_bytes().split(b"\n")[:-1]  # behind the last newline is nothing, or a torn line
        entries += [Entry(*json.loads(line)) for line in lines]
    return sorted(entries, key=lambda entry: entry.at_ns)


@dataclass(frozen=True, slots=True)
class Group:
    """One training group, as a policy remembers having been trained on it."""

    producer: str
    seq: int
    index: int
    """Training index of its lease."""
    min_version: int


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step of the surviving history."""

    version: int
    """Version that the step started from."""
    groups: tuple[Group, ...]


def digest(history: Iterable[Step]) -> str:
    """A name of a history, equal for equal ones only."""
    flat = [[s.version, [[g.producer, g.seq, g.index, g.min_version] for g in s.groups]] for s in history]
    return hashlib.sha256(json.dumps(flat).encode()).hexdigest()
