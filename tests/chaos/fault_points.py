"""Named points at which a process kills itself, and the taps that put them around the product's own calls.

Product code knows nothing of it: in the process that is to die a method is replaced by one that calls it between two
points, ``NAME:before`` and ``NAME:after``. Which point is lethal is in a file, so that it can be armed at any moment.
"""

import functools
import os
import random
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lambdapo_async import broker
from lambdapo_async.broker import script as script_module
from lambdapo_async.broker.script import Script
from tests.chaos.ledger import Ledger

_NOWHERE = "nowhere"
Watch = Callable[..., None]
"""Called with a tapped call's result and its arguments."""


def arm(folder: Path, who: str, point: str, count: int) -> None:
    """Let ``who`` die when it comes to ``point`` for the ``count``-th time from now on."""
    path = _orders(folder, who)
    partial = path.with_suffix(".partial")
    partial.write_text(f"{point} {count}")
    partial.rename(path)


def disarm(folder: Path, who: str) -> None:
    """Let ``who`` live, also when it has read its orders already."""
    arm(folder, who, _NOWHERE, 1)


def _orders(folder: Path, who: str) -> Path:
    return folder / f"{who}.armed"


@dataclass(slots=True)
class FaultPoints:
    """The points of one process."""

    folder: Path
    who: str
    ledger: Ledger
    names: list[str] = field(default_factory=list)
    _armed: str = ""
    _left: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def reach(self, point: str) -> None:
        """Die here if it is the armed point's turn."""
        with self._lock:
            orders = _orders(self.folder, self.who)
            if orders.exists():
                self._armed, count = orders.read_text().split()
                self._left = int(count)
                orders.unlink()
            if point != self._armed:
                return
            self._left -= 1
            if self._left <= 0:
                self.ledger.write("dying", point=point)
                os.kill(os.getpid(), signal.SIGKILL)
                threading.Event().wait()  # the signal is on its way; nothing may happen meanwhile

    def tap(
        self, owner: Any, attribute: str, name: str, *, before: Watch | None = None, after: Watch | None = None
    ) -> None:
        """Put points around ``owner.attribute``; ``before`` gets its arguments, ``after`` the result first."""
        call = getattr(owner, attribute)
        self.names.append(name)

        @functools.wraps(call)
        def tapped(*args: Any, **named: Any) -> Any:
            if before is not None:
                before(*args, **named)
            self.reach(f"{name}:before")
            result = call(*args, **named)
            if after is not None:
                after(result, *args, **named)
            self.reach(f"{name}:after")
            return result

        setattr(owner, attribute, tapped)

    def tap_scripts(self) -> None:
        """Points around every Lua script: ``lua`` for any of them, ``lua.NAME`` for one; the ledger counts attempts."""
        names: dict[int, str] = {}
        initialise = Script.__init__

        def named(script: Script, broker: Any, name: str, **kind: Any) -> None:
            initialise(script, broker, name, **kind)
            names[id(script)] = name

        def tapped(call: Callable[..., Any]) -> Callable[..., Any]:
            def tapped_call(script: Script, *args: Any) -> Any:
                name = names[id(script)]
                self.reach("lua:before")
                self.reach(f"lua.{name}:before")
                reply = call(script, *args)
                self.reach(f"lua.{name}:after")
                self.reach("lua:after")
                return reply

            return tapped_call

        Script.__init__ = named  # type: ignore[method-assign]
        Script.__call__, Script.after = tapped(Script.__call__), tapped(Script.after)  # type: ignore[method-assign]
        round_trip = script_module.round_trip

        def attempted(*args: Any) -> list[Any]:
            self.ledger.write("attempted")
            return round_trip(*args)

        script_module.round_trip = attempted
        self.names += ["lua", *(f"lua.{path.stem}" for path in Path(*broker.__path__).glob("*.lua"))]

    def check(self, names: Sequence[str]) -> None:
        """A point that no tap makes would never be lethal."""
        missing = sorted(set(names) - set(self.names))
        assert not missing, f"no tap makes the points {missing}"


LEARNER_POINTS = (
    "fence", "load", "open", "create", "rows", "initialise", "read", "enter", "append", "commit", "release", "sample",
    "train", "drop", "save", "renamed", "prune", "forget", "publish", "republish", "flip", "phase", "fsync",
    "lua", "lua.take_over", "lua.weights_begin", "lua.weights_put", "lua.weights_flip", "lua.weights_retire",
)  # fmt: skip
ACTOR_POINTS = (
    "lease", "renew", "enqueue", "hand_back", "sampled", "beat", "advance", "spool", "spool_delete", "adopt", "fsync",
    "lua", "lua.enqueue", "lua.marks", "lua.weights_reader", "lua.beat",
)  # fmt: skip
FREQUENT = (
    "fsync", "lua", "read", "enter", "append", "commit", "release", "beat", "lease", "enqueue", "sampled", "spool",
    "spool_delete", "lua.enqueue",
)  # fmt: skip
"""Reached many times a second: any of the next ones may be it."""


def choose_point(source: random.Random, names: Sequence[str]) -> tuple[str, int]:
    """A point and which of its turns is lethal."""
    name = source.choice(names)
    return f"{name}:{source.choice(('before', 'after'))}", source.randrange(1, 40 if name in FREQUENT else 4)
