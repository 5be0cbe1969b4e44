"""What actors join with and follow is missed by the learner when a Redis of the wrong policy evicts it."""

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lambdapo_async.weights.catch_up import plan_catch_up
from tests.contract.broker_world import until
from tests.fakes_broker import FakeRun
from tests.fakes_redis_run import FakeRedisRun
from tests.learner_stage import acting, is_open, stage_config, staged
from tests.tiny_models import tiny_model_folder
from tests.unit.test_resync import assert_nothing_lost, at_step

EVICTIONS: dict[str, Callable[[FakeRedisRun], object]] = {
    "config": lambda state: setattr(state, "config", None),
    "model files": lambda state: state.files.clear(),
    "rows": lambda state: state.rows.pop("train"),
    "head": lambda state: setattr(state, "head", None),
    "weight files": lambda state: state.weight_files.clear(),
    "pieces": lambda state: state.lost_files.update(state.weight_files),
}


@pytest.mark.parametrize("victim", EVICTIONS)
@pytest.mark.parametrize("is_idle", [False, True])
def test_what_redis_evicted_is_published_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str, is_idle: bool
) -> None:
    """Seen before the next version goes out; or while the learner waits for actors, who wait for what is gone."""
    monkeypatch.setattr("learner.resync._CHECKED_EVERY_S", 0.0)
    (tmp_path / "model").symlink_to(tiny_model_folder(tmp_path / "tiny"))
    run, config = FakeRun("run"), stage_config()

    def evict() -> None:
        with run.shared.lock:
            EVICTIONS[victim](run.shared)

    def is_whole() -> bool:
        state = run.shared
        with state.lock:
            return None not in (state.config, state.head) and bool(
                state.files and state.weight_files and "train" in state.rows and not state.lost_files
            )

    with staged(run, tmp_path, config) as stage, contextlib.ExitStack() as actors:
        if not is_idle:
            actors.enter_context(acting(run, config))
            at_step(stage, 3, evict)
            stage.learner.run()
        else:
            learner = threading.Thread(target=stage.learner.run)
            learner.start()
            until(lambda: is_open(run))
            evict()
            until(is_whole)
            actors.enter_context(acting(run, config))
            learner.join(60)
            assert not learner.is_alive()
    assert_nothing_lost(tmp_path)
    assert is_whole()
    assert [run.run_store.num_rows(split) for split in ("train", "heldout")] == [20, 20]
    plan_catch_up(run.weights.files(), at=None, head=run.weights.head())
