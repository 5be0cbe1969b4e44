"""`python -m actors.nursery`: imports vLLM once and forks actors, each ready in about a second.

For CPU only: importing costs 7-9 s of CPU per process there, and a process that has initialised CUDA cannot be forked.

Protocol, one JSON object per line. On stdin ``{"args": ["--redis-url", "redis://...", "--run-id", "x"], "log": "a"}``
starts one actor. On stdout ``{"event": "ready"}``, ``{"event": "started", "pid": 1}``,
``{"event": "exited", "pid": 1, "returncode": 0}`` (negative: killed by that signal) and
``{"event": "refused", "reason": "..."}`` for a line that is no order. The end of stdin, SIGTERM or Ctrl-C ends the
actors and then the nursery; a nursery killed with -9 takes its actors with it.
"""

import gc
import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TextIO

from pydantic import BaseModel, ConfigDict, ValidationError

from actors.environment import is_cpu_build, prepare_environment
from lambdapo_async.parent_death import die_with_parent

_PRELOADED = (
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.v1.core.sched.scheduler",
    "vllm.model_executor.models.qwen3",
    "vllm.model_executor.model_loader.dummy_loader",
    "transformers.models.qwen3.modeling_qwen3",
    "actors.vllm_engine",
    "actors.session",
)
"""Never ``actors.vllm_worker``, which acts on the process that imports it."""
STOP_TIMEOUT_S = 15.0
"""Between SIGTERM and SIGKILL of an actor."""
_ENDING = (signal.SIGTERM, signal.SIGINT)


class Order(BaseModel):
    """One line of stdin: start an actor."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    args: list[str]
    """What would follow ``python -m actors``."""
    log: Path
    """File that gets the actor's stdout and stderr, appended."""


class Nursery:
    """Owns the forked actors; single-threaded, because it forks."""

    def __init__(self, orders: int, events: TextIO) -> None:
        """``orders``: file descriptor to read from; ``events``: file to write to."""
        self._orders, self._events = orders, events
        self._actors: dict[int, BaseProcess] = {}
        self._buffer = b""
        # A signal only wakes the loop up; what it means is decided there, never in the middle of a fork.
        self._woken, self._waker = socket.socketpair()
        self._waker.setblocking(False)

    def run(self) -> None:
        """Serve orders until stdin ends or a signal asks to stop."""
        signal.set_wakeup_fd(self._waker.fileno())
        for number in _ENDING:
            signal.signal(number, lambda *_: None)
        self._say(event="ready")
        try:
            while self._serve():
                pass
        finally:
            self._stop()

    def _serve(self) -> bool:
        """Wait for one thing to happen; False when it is the end."""
        sentinels = {actor.sentinel: actor for actor in self._actors.values()}
        happened = wait([self._orders, self._woken, *sentinels])
        for sentinel in sentinels.keys() & set(happened):
            self._bury(sentinels[sentinel])
        if self._woken in happened:
            return False
        return self._read_orders() if self._orders in happened else True

    def _read_orders(self) -> bool:
        read = os.read(self._orders, 65536)
        *lines, self._buffer = (self._buffer + read).split(b"\n")
        for line in lines:
            self._obey(line)
        return bool(read)

    def _obey(self, line: bytes) -> None:
        try:
            order = Order.model_validate_json(line)
            order.log.parent.mkdir(parents=True, exist_ok=True)
            log = os.open(order.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except (ValidationError, OSError) as error:
            self._say(event="refused", reason=str(error))
            return
        context = multiprocessing.get_context("fork")
        actor = context.Process(target=_be_actor, args=(order.args, log, os.getpid()), name="actor")
        # Held back until the child has its own handlers; ours would lose a signal that comes too early.
        signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
        actor.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
        os.close(log)
        assert actor.pid is not None
        self._actors[actor.pid] = actor
        self._say(event="started", pid=actor.pid)

    def _bury(self, actor: BaseProcess) -> None:
        actor.join()
        assert actor.pid is not None
        del self._actors[actor.pid]
        self._say(event="exited", pid=actor.pid, returncode=actor.exitcode)

    def _stop(self) -> None:
        """SIGTERM to all, SIGKILL to those that are still there at the deadline."""
        for actor in self._actors.values():
            actor.terminate()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for actor in list(self._actors.values()):
            actor.join(max(0.0, deadline - time.monotonic()))
            if actor.exitcode is None:
                actor.kill()
            self._bury(actor)

    def _say(self, **event: str | int | None) -> None:
        self._events.write(json.dumps(event) + "\n")
        self._events.flush()


def _be_actor(arguments: list[str], log: int, nursery_pid: int) -> None:
    """What a forked child does: become a process like one of ``python -m actors``."""
    die_with_parent(nursery_pid)
    os.setsid()  # Ctrl-C at the terminal is the nursery's to pass on
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, file in enumerate((nothing, log, log)):
        os.dup2(file, descriptor)
    os.close(nothing)
    os.close(log)
    from actors.__main__ import main

    main(arguments)


def _preload() -> None:
    """Import what an actor and its engine's process need, once, and keep the copies shared."""
    for module in _PRELOADED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # else the first collection in each child touches, and so copies, every page


def main() -> None:
    """Run the nursery on stdin and stdout."""
    if not is_cpu_build():
        sys.exit("actors.nursery forks after importing vLLM, which only its CPU build allows: use python -m actors")
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # vLLM logs to stdout, which is our protocol's
    prepare_environment()
    _preload()
    Nursery(sys.stdin.fileno(), events).run()


if __name__ == "__main__":
    main()
