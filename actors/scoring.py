"""Rewards off the event loop and under a deadline: one worker process, replaced when an answer hangs it."""

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Sequence
from multiprocessing.pool import Pool

from lambdapo_async.config import RunConfig
from lambdapo_async.parent_death import die_with_parent
from lambdapo_async.tasks.interface import Row, Scored, Task
from lambdapo_async.tasks.registry import build_task

_task: Task  # set once in the worker process, by its initializer


def _start_worker(config: RunConfig, parent_pid: int) -> None:
    """The worker ignores Ctrl-C (its actor drains first) and dies with its actor."""
    global _task
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent(parent_pid)
    _task = build_task(config)


def _score(row: Row, completions: Sequence[str]) -> list[Scored]:
    return _task.score(row, completions)


class Scorer:
    """Scores completions in a worker process; :attr:`failures` counts groups that hit the deadline."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._deadline_s = config.actor.reward_timeout_s
        self._pool = self._new_pool()
        self._worker_free = asyncio.Lock()
        self.failures = 0

    async def score(self, row: Row, completions: Sequence[str]) -> list[Scored]:
        """Rewards of ``completions``; all 0 when the deadline passes (counted).

        Raises:
            TaskError: a reward function is broken; its own exception is the cause.
        """
        async with self._worker_free:  # the deadline is the worker's, not the queue's
            return await self._score(row, completions)

    async def _score(self, row: Row, completions: Sequence[str]) -> list[Scored]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[Scored]] = loop.create_future()
        self._pool.apply_async(
            _score,
            (row, list(completions)),
            callback=lambda scored: loop.call_soon_threadsafe(_resolve, answer, scored),
            error_callback=lambda error: loop.call_soon_threadsafe(_fail, answer, error),
        )
        try:
            return await asyncio.wait_for(answer, self._deadline_s)
        except TimeoutError:
            self.failures += 1
            self.close()
            self._pool = self._new_pool()
            return [Scored(0.0, {"verifiable": 0.0, "scoring_timeout": 1.0}) for _ in completions]

    def close(self) -> None:
        """End the worker; what it was scoring is lost."""
        self._pool.terminate()
        self._pool.join()

    def _new_pool(self) -> Pool:
        # spawn, not fork: the parent holds an engine, threads and sockets that a worker must not inherit.
        context = multiprocessing.get_context("spawn")
        return context.Pool(1, initializer=_start_worker, initargs=(self._config, os.getpid()))


def _resolve(answer: asyncio.Future[list[Scored]], scored: list[Scored]) -> None:
    if not answer.done():
        answer.set_result(scored)


def _fail(answer: asyncio.Future[list[Scored]], error: BaseException) -> None:
    if not answer.done():
        answer.set_exception(error)
