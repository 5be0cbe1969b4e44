"""``replay.samples_per_insert`` in the learner's own queue: both sides wait, and neither is left."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lambdapo_async.broker.interface import Delivery
from lambdapo_async.wire import encode_group
from tests.batcher_bench import CONFIG, NEVER, Bench, ListSource, delivery
from tests.groups import make_group

WAIT_S = 20.0


class MeteredSource(ListSource):
    """Delivers as many as it was allowed to."""

    def __init__(self, *deliveries: Delivery | Exception) -> None:
        super().__init__(*deliveries)
        self.allowed = threading.Semaphore(0)

    def read(self, max_groups: int, *, timeout_s: float) -> list[Delivery]:
        return super().read(max_groups, timeout_s=timeout_s) if self.allowed.acquire(timeout=timeout_s) else []


HAND_OVER_GROUPS = 3


@pytest.fixture
def metered(tmp_path: Path) -> Iterator[tuple[Bench, MeteredSource]]:
    """Each of 100 groups is to be sampled twice, give or take four samples; the first step needs four groups."""
    size = len(encode_group(make_group(0)))
    replay = CONFIG.replay.model_copy(
        update={
            "max_uses": 5,
            "min_size": 4,
            "samples_per_insert": 2.0,
            "error_buffer": 4.0,
            "max_bytes": 4 * HAND_OVER_GROUPS * (size + 1),
        }
    )
    source = MeteredSource(*(delivery(i + 1, make_group(i)) for i in range(100)))
    on = Bench(tmp_path, config=CONFIG.model_copy(update={"replay": replay}), source=source)
    yield on, source
    on.close()


@pytest.mark.parametrize(("allowed", "steps_before"), [(3, 0), (4, 2), (5, 3)])
def test_a_ratio_lets_the_learner_wait(metered: tuple[Bench, MeteredSource], allowed: int, steps_before: int) -> None:
    """For the smallest size; then before it has sampled more than four times ahead of the groups that came."""
    on, source = metered
    source.allowed.release(allowed)
    for _ in range(steps_before):
        assert on.next_batch(0) is not None
    idle = threading.Event()

    def be_idle() -> None:
        if on.pool.num_groups == allowed:
            idle.set()

    with ThreadPoolExecutor(1) as learner:
        batch = learner.submit(on.batcher.next_batch, on.steps + 1, 0, stopping=NEVER, while_idle=be_idle)
        assert idle.wait(WAIT_S), "it did not wait for the last group that it needs"
        assert (batch.done(), on.pool.missing_inserts()) == (False, 1)
        source.allowed.release()
        assert batch.result(WAIT_S) is not None


def test_a_ratio_lets_the_groups_wait(metered: tuple[Bench, MeteredSource]) -> None:
    on, source = metered
    source.allowed.release(100)
    for step in range(1, 31):
        assert on.next_batch(0) is not None
        counts = on.pool.state().replay.limiter
        assert counts.samples == 2 * step
        assert abs((counts.inserts - 4) * 2.0 - counts.samples) <= 4.0
        # Besides what went in: one that found no place, what the hand-over holds, and one that waits for room there.
        assert source.committed["p"] <= counts.inserts + 1 + HAND_OVER_GROUPS + 1
    assert source.committed["p"] < 50, "more than half of the groups are where actors see that nobody takes them"
