"""What an actor needs to join a run, but the weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from lambdapo_async.broker.interface import RunStore
from lambdapo_async.config import RunConfig
from lambdapo_async.errors import RunNotFoundError
from lambdapo_async.rollout import Split
from lambdapo_async.tasks.interface import Row


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a run that fit its context."""

    train: list[Row]
    heldout: list[Row]


class Publication:
    """Config, model files and rows of one run, to be written to Redis as often as it forgets them."""

    def __init__(
        self, store: RunStore, config: RunConfig, model_files: Mapping[str, bytes], rows: Rows, *, fence: int
    ) -> None:
        self._store, self._model_files, self._fence = store, dict(model_files), fence
        self._config_json = json.dumps(config.published()).encode()
        self._rows: dict[Split, list[Row]] = {"train": rows.train, "heldout": rows.heldout}

    def write(self) -> None:
        """Write everything; the run is ``starting`` from then on.

        Raises:
            FencedError: a newer learner owns the run.
            TaskError: the rows are too many for Redis.
        """
        self._store.create(self._config_json, self._model_files, fence=self._fence)
        for split, rows in self._rows.items():
            self._store.put_rows(split, [row.as_map() for row in rows])

    def is_there(self) -> bool:
        """Whether Redis holds it; rows are many, and their number goes in last."""
        try:
            return (
                self._store.config_json() == self._config_json
                and self._store.model_files() == self._model_files
                and self.looks_whole()
            )
        except RunNotFoundError:
            return False

    def looks_whole(self) -> bool:
        """Whether no part of it is gone: much cheaper than :meth:`is_there`, which also compares what is there."""
        num_rows = {split: len(rows) for split, rows in self._rows.items()}
        return self._store.is_published(num_files=len(self._model_files), num_rows=num_rows)
