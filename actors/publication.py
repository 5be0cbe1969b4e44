"""Waits for a run that its learner has yet to publish, and names the runs that a mistyped run id may have meant."""

import difflib
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.errors import RunNotPublishedError
from lambdapo_async.rollout import SPLITS

logger = logging.getLogger(__name__)

T = TypeVar("T")

PUBLICATION_S = 600.0
"""A learner publishes when its model is loaded, and again when it finds that Redis came back empty."""
_POLL_S = 0.5
_NAMES_SHOWN = 3


def published_config(run: RedisRun, *, timeout_s: float) -> bytes:
    """The run's config, as soon as Redis holds all that an actor joins with.

    Raises:
        RunNotPublishedError: not within ``timeout_s``.
        RunNotFoundError: the run is there, in a schema that is not ours.
    """

    def read() -> bytes:
        config_json = run.run_store.config_json()
        run.run_store.model_files()
        for split in SPLITS:
            run.run_store.num_rows(split)
        return config_json

    return _published(run, read, timeout_s=timeout_s)


def published_model_files(run: RedisRun, *, timeout_s: float = PUBLICATION_S) -> dict[str, bytes]:
    """File name -> content. Redis may have evicted them since the config was read.

    Raises:
        RunNotPublishedError: not within ``timeout_s``.
    """
    return _published(run, run.run_store.model_files, timeout_s=timeout_s)


def _published(run: RedisRun, read: Callable[[], T], *, timeout_s: float) -> T:
    """What ``read`` returns as soon as it finds it."""
    deadline, is_told = time.monotonic() + timeout_s, False
    while True:
        try:
            return read()
        except RunNotPublishedError as error:
            if time.monotonic() >= deadline:
                raise RunNotPublishedError(f"{error}{_other_runs(run)}") from error
            if not is_told:
                logger.warning(
                    "%s%s; waiting up to %g s for its learner to publish it", error, _other_runs(run), timeout_s
                )
                is_told = True
            time.sleep(_POLL_S)


def _other_runs(run: RedisRun) -> str:
    """For a person who may have mistyped the run id: the nearest of those that are here; empty where it is one."""
    wanted, others = run.keys.run_id, run.run_ids()
    if not others or wanted in others:
        return ""
    nearest = difflib.get_close_matches(wanted, others, n=_NAMES_SHOWN, cutoff=0.0)
    return f" (it holds {', '.join(map(repr, nearest))}{' and others' if len(others) > len(nearest) else ''})"
