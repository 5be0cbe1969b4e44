"""Actors that the demo starts and kills: forked by the nursery on a CPU, plain processes on a GPU."""

import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lambdapo_async.cli.supervise import Child, ChildFailedError, Supervisor
from lambdapo_async.errors import LambdaPOError
from lambdapo_async.metrics import JsonLinesTail

NURSERY_COMMAND = (sys.executable, "-m", "actors.nursery")
ACTOR_COMMAND = (sys.executable, "-m", "actors")
_POLL_S = 0.1


class NurseryError(LambdaPOError):
    """The nursery does not start an actor."""


@dataclass(slots=True)
class PooledActor:
    """One actor that was asked for."""

    name: str
    log: Path
    pid: int | None = None
    """None until it is started."""
    returncode: int | None = None
    """None while it runs; negative is the signal that ended it."""
    killed: bool = False
    """We killed it on purpose."""


class ActorPool(Protocol):
    """Starts actors of one run and knows how each of them fares."""

    def start(self) -> PooledActor:
        """Ask for one more actor."""

    def poll(self) -> tuple[PooledActor, ...]:
        """All actors ever asked for, in order; ``ChildFailedError`` when no actor can be started any more."""

    def finish(self, timeout_s: float) -> None:
        """Ask for no more actors, and wait at most ``timeout_s`` for the running ones to end by themselves."""


def kill_one(pool: ActorPool) -> PooledActor | None:
    """SIGKILL the actor that runs longest; None while none runs."""
    running = [actor for actor in pool.poll() if actor.pid is not None and actor.returncode is None]
    if not running:
        return None
    victim = running[0]
    victim.killed = True
    if victim.pid is not None:
        with suppress(ProcessLookupError):
            os.kill(victim.pid, signal.SIGKILL)
    return victim


def require_healthy(pool: ActorPool) -> None:
    """``ChildFailedError`` when an actor failed that was not killed on purpose; with 0 it saw the end of the run."""
    for actor in pool.poll():
        if actor.returncode and not actor.killed:
            raise ChildFailedError(actor.name, actor.returncode, actor.log)


class NurseryPool:
    """Actors forked by a process that has already imported what they need: ready in a second (CPU only)."""

    def __init__(
        self,
        supervisor: Supervisor,
        actor_arguments: Sequence[str],
        *,
        logs: Path,
        command: Sequence[str] = NURSERY_COMMAND,
    ) -> None:
        self._supervisor, self._arguments, self._logs = supervisor, list(actor_arguments), logs
        self._actors: list[PooledActor] = []
        self._asked: deque[PooledActor] = deque()
        events = logs / "nursery.events.jsonl"
        self._nursery: Child = supervisor.start("the nursery", command, log=logs / "nursery.log", events=events)
        self._events = JsonLinesTail(events)

    def start(self) -> PooledActor:
        """Ask for one more actor."""
        actor = PooledActor(f"actor-{len(self._actors)}", self._logs / f"actor-{len(self._actors)}.log")
        order = json.dumps({"args": self._arguments, "log": str(actor.log)})
        with suppress(BrokenPipeError):  # it has died: the next poll says of what
            self._nursery.stdin.write(order.encode() + b"\n")
        self._actors.append(actor)
        self._asked.append(actor)
        return actor

    def poll(self) -> tuple[PooledActor, ...]:
        """All actors ever asked for, in order."""
        for event in self._events.take():
            self._note(event["event"], event)
        self._nursery.require_running()
        return tuple(self._actors)

    def finish(self, timeout_s: float) -> None:
        """Wait for the actors, which see that the run is finished; the end of its input then ends the nursery."""
        deadline = time.monotonic() + timeout_s
        while any(actor.returncode is None for actor in self.poll()) and time.monotonic() < deadline:
            self._nursery.wait(_POLL_S)
        self._nursery.stdin.close()
        self._nursery.wait(max(deadline - time.monotonic(), 0.0))

    def _note(self, kind: str, event: Mapping[str, Any]) -> None:
        if kind == "started":  # it answers in the order in which it was asked
            self._asked.popleft().pid = event["pid"]
            self._supervisor.adopt(event["pid"])  # it leads a group, in which its engine runs
        elif kind == "refused":
            raise NurseryError(f"the nursery refused to start {self._asked.popleft().name}: {event['reason']}")
        elif kind == "exited":
            self._supervisor.bury(event["pid"])
            for actor in self._actors:
                if actor.pid == event["pid"] and actor.returncode is None:
                    actor.returncode = event["returncode"]


class ProcessPool:
    """Actors as processes of their own, as on any GPU machine."""

    def __init__(
        self,
        supervisor: Supervisor,
        actor_arguments: Sequence[str],
        *,
        logs: Path,
        command: Sequence[str] = ACTOR_COMMAND,
    ) -> None:
        self._supervisor, self._command, self._logs = supervisor, (*command, *actor_arguments), logs
        self._members: list[tuple[PooledActor, Child]] = []

    def start(self) -> PooledActor:
        """Start one more actor."""
        name = f"actor-{len(self._members)}"
        child = self._supervisor.start(name, self._command, log=self._logs / f"{name}.log")
        actor = PooledActor(name, child.log, child.pid)
        self._members.append((actor, child))
        return actor

    def poll(self) -> tuple[PooledActor, ...]:
        """All actors ever started, in order."""
        for actor, child in self._members:
            actor.returncode = child.poll()
        return tuple(actor for actor, _ in self._members)

    def finish(self, timeout_s: float) -> None:
        """Wait for the actors, which see that the run is finished."""
        deadline = time.monotonic() + timeout_s
        for _, child in self._members:
            child.wait(max(deadline - time.monotonic(), 0.0))
