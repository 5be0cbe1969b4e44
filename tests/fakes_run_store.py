"""What a run is, in memory: config, model files, rows, phase."""

from collections.abc import Mapping, Sequence

from lambdapo_async.broker.interface import Phase, RunState
from lambdapo_async.errors import BrokerError, RunNotFoundError, RunNotPublishedError, TaskError
from lambdapo_async.rollout import Split
from tests.fakes_redis_run import SCHEMA, FakeRedisRun


class FakeRunStore:
    """``interface.RunStore``"""

    def __init__(self, state: FakeRedisRun, owner: str, run_id: str) -> None:
        self._state, self._owner, self._run_id = state, owner, run_id

    def take_over(self, *, fence: int) -> None:
        with self._state.lock:
            self._state.take_over(fence, self._owner)

    def create(self, config_json: bytes, model_files: Mapping[str, bytes], *, fence: int) -> None:
        state = self._state
        with state.lock:
            state.take_over(fence, self._owner)
            state.schema, state.phase = SCHEMA, "starting"
            state.config, state.files = config_json, dict(model_files)

    def put_rows(self, split: Split, rows: Sequence[Mapping[str, str | None]]) -> None:
        if len(rows) > 10_000_000:
            raise TaskError(f"{len(rows)} {split} rows are too many: set task.max_rows")
        with self._state.lock:
            self._state.rows[split] = [dict(row) for row in rows]

    def config_json(self) -> bytes:
        with self._state.lock:
            self.state()
            if self._state.config is None:
                raise RunNotPublishedError(f"run {self._run_id} has no config yet")
            return self._state.config

    def model_files(self) -> dict[str, bytes]:
        with self._state.lock:
            if not self._state.files:
                raise RunNotPublishedError(f"run {self._run_id} has no model files yet")
            return dict(self._state.files)

    def num_rows(self, split: Split) -> int:
        with self._state.lock:
            if split not in self._state.rows:
                raise RunNotPublishedError(f"run {self._run_id} has no {split} rows yet")
            return len(self._state.rows[split])

    def is_published(self, *, num_files: int, num_rows: Mapping[Split, int]) -> bool:
        state = self._state
        with state.lock:
            found = {split: len(state.rows[split]) if split in state.rows else None for split in num_rows}
            return state.config is not None and len(state.files) == num_files and found == num_rows

    def row(self, split: Split, index: int) -> Mapping[str, str | None]:
        with self._state.lock:
            rows = self._state.rows.get(split)
            if rows is None:
                raise RunNotFoundError(f"run {self._run_id} has no rows from 0 on in {split}")
            if not 0 <= index < len(rows):
                raise BrokerError(f"run {self._run_id} has no row {index} in {split}")
            return rows[index]

    def state(self) -> RunState:
        state = self._state
        with state.lock:
            if state.schema is None or state.phase is None:
                raise RunNotPublishedError(f"this Redis holds no run {self._run_id!r}: check the run id and the URL")
            if state.schema != SCHEMA:
                raise RunNotFoundError(f"run {self._run_id} speaks schema {state.schema}, this version speaks {SCHEMA}")
            version = -1 if state.head is None else state.head
            return RunState(state.phase, state.epoch, version, state.schema, state.learner_silent_s)

    def set_phase(self, phase: Phase, *, fence: int) -> None:
        with self._state.lock:
            self._state.check_fence(fence)
            self._state.phase = phase
