import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from lambdapo_async.errors import BrokerUnavailable, FencedError, LostDataError, WeightsError
from lambdapo_async.metrics import METRICS
from lambdapo_async.weights.catch_up import Available
from lambdapo_async.weights.delta_file import read_delta, read_full
from lambdapo_async.weights.manifest import NewFile
from lambdapo_async.weights.state import State
from learner.publisher import Publisher

NUM = 3000


class Weights:
    """A policy of one tensor, of which the first half is trained."""

    def __init__(self) -> None:
        self.value = 0.0

    def published(self) -> Iterator[tuple[str, Tensor]]:
        weight = torch.linspace(-1, 1, NUM).to(torch.bfloat16)
        weight[: NUM // 100] = self.value
        yield "w", weight


class Store:
    """A weight store that publishes when it is let, and raises what it is told to."""

    def __init__(self) -> None:
        self.published: list[tuple[int, tuple[NewFile, ...], int, int]] = []
        self.threads: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.error: Exception | None = None

    def publish(self, version: int, files: Sequence[NewFile], *, consumed: int, fence: int) -> None:
        self.entered.set()
        assert self.gate.wait(30)
        if self.error is not None:
            raise self.error
        self.threads.append(threading.current_thread().name)
        self.published.append((version, tuple(files), consumed, fence))

    def head(self) -> int | None:
        return self.published[-1][0] if self.published else None

    def wait_newer(self, than: int, *, timeout_s: float) -> int | None:
        raise NotImplementedError

    def files(self) -> tuple[Available, ...]:
        return tuple(file.available for _, files, _, _ in self.published for file in files)

    def lost(self) -> tuple[Available, ...]:
        return ()

    def fetch(self, file: Available) -> bytes:
        raise NotImplementedError


def followed(store: Store) -> Iterator[float]:
    """The trained value after each version, as an actor gets it."""
    with ThreadPoolExecutor(1) as pool:
        state: State | None = None
        for version, (file, *_), _, _ in store.published:
            if file.available.base_version is None:
                state = read_full(file.payload, run_id="run-1", version=version, max_bytes=2**20, pool=pool)
            else:
                assert state is not None
                read_delta(file.payload, max_bytes=2**20).apply_to(state, run_id="run-1", version=version, pool=pool)
            bits = state.tensors["w"].bits.astype(np.int16)
            yield float(torch.from_numpy(bits).view(torch.bfloat16)[0])


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def publisher(store: Store) -> Iterator[Publisher]:
    publisher = Publisher(store, run_id="run-1", fence=3)
    yield publisher
    store.gate.set()
    store.error = None
    publisher.close()


def test_a_version_arrives_verified_with_fence_and_consumed(store: Store, publisher: Publisher) -> None:
    publisher.publish(5, Weights(), consumed=48)
    publisher.flush()
    version, (file,), consumed, fence = store.published[0]
    assert (version, consumed, fence, publisher.newest_version) == (5, 48, 3, 5)
    assert file.available == Available(version=5, num_bytes=len(file.payload))
    assert list(followed(store)) == [0.0]


def test_training_goes_on_while_the_snapshot_is_sent(store: Store, publisher: Publisher) -> None:
    store.gate.clear()
    weights = Weights()
    publisher.publish(0, weights, consumed=0)
    assert store.entered.wait(30)
    assert publisher.newest_version == 0  # an actor may have it a moment before the store has answered
    weights.value = 9.0  # the next step, before version 0 has left
    store.gate.set()
    publisher.publish(1, weights, consumed=0)
    publisher.flush()
    assert list(followed(store)) == [0.0, 9.0]
    assert set(store.threads) == {"publisher_0"}


def test_after_a_failed_publish_the_next_starts_from_what_is_out(store: Store, publisher: Publisher) -> None:
    """The sender must not advance: a difference from a version that never came out is of no use."""
    weights = Weights()
    publisher.publish(0, weights, consumed=0)
    publisher.flush()
    store.error, weights.value = WeightsError("full disk"), 1.0
    publisher.publish(1, weights, consumed=0)
    with pytest.raises(WeightsError, match="full disk"):
        publisher.flush()
    store.error, weights.value = None, 2.0
    publisher.publish(2, weights, consumed=0)
    publisher.flush()
    assert [files[0].available.base_version for _, files, _, _ in store.published] == [None, 0]
    assert list(followed(store)) == [0.0, 2.0]


def test_a_publish_that_failed_after_all_was_out_makes_the_next_one_whole(store: Store, publisher: Publisher) -> None:
    weights = Weights()
    publisher.publish(0, weights, consumed=0)
    publisher.flush()
    store.error = WeightsError("the reply was lost")
    publisher.publish(1, weights, consumed=0)
    with pytest.raises(WeightsError):
        publisher.flush()
    store.error = None
    store.published.append((1, (), 0, 3))  # the store had it after all
    publisher.publish(2, weights, consumed=0)
    publisher.flush()
    assert store.published[-1][1][0].available.base_version is None


def test_what_the_store_lost_goes_out_whole_under_a_new_number(store: Store, publisher: Publisher) -> None:
    weights = Weights()
    assert publisher.is_out()
    publisher.republish(0, consumed=0)  # nothing was published yet
    for version in (0, 1):
        weights.value = float(version)
        publisher.publish(version, weights, consumed=0)
    publisher.settle()
    assert publisher.is_out()
    del store.published[0]  # the head is there, but what it is made from is not
    assert not publisher.is_out()
    store.published.clear()
    assert not publisher.is_out()
    publisher.republish(7, consumed=3)
    assert publisher.is_out()
    assert [(version, consumed) for version, _, consumed, _ in store.published] == [(7, 3)]
    assert list(followed(store)) == [1.0]
    weights.value = 2.0
    publisher.publish(8, weights, consumed=4)
    publisher.flush()
    assert store.published[-1][1][0].available.base_version == 7
    assert list(followed(store)) == [1.0, 2.0]


def test_a_publish_that_failed_is_sent_again(store: Store, publisher: Publisher) -> None:
    store.error = LostDataError("gone")
    publisher.publish(0, Weights(), consumed=0)
    publisher.settle()
    assert not publisher.is_out()
    store.error = None
    publisher.republish(1, consumed=0)
    assert list(followed(store)) == [0.0]


def test_a_version_that_is_out_without_our_knowing_is_sent_again(store: Store, publisher: Publisher) -> None:
    """Or the canary of its number would bear the checksum of the version before (found by chaos, a frozen Redis)."""
    weights = Weights()
    publisher.publish(0, weights, consumed=0)
    publisher.flush()
    weights.value = 1.0
    store.error = BrokerUnavailable("the reply was lost")
    publisher.publish(1, weights, consumed=0)
    publisher.settle()
    store.error = None
    whole = NewFile(Available(version=1, num_bytes=1), b"1")
    store.published.append((1, (whole,), 0, 3))  # the store had it after all
    assert not publisher.is_out()
    publisher.republish(2, consumed=0)
    assert publisher.is_out()
    with ThreadPoolExecutor(1) as pool:
        assert publisher.checksum() == State.of_torch(2, dict(weights.published())).checksum(pool)


def test_a_publish_is_reported_once(store: Store, publisher: Publisher) -> None:
    weights = Weights()
    assert publisher.take_report() == {}
    publisher.publish(0, weights, consumed=0)
    publisher.flush()
    first = publisher.take_report()
    assert publisher.take_report() == {}
    weights.value = 3.0
    publisher.publish(1, weights, consumed=0)
    publisher.flush()
    second = publisher.take_report()
    assert {name for name in METRICS if name.startswith("weights/")} == first.keys() == second.keys()
    assert (first["weights/keyframe"], first["weights/union"], first["weights/changed"]) == (1.0, 0.0, 1.0)
    assert (second["weights/keyframe"], second["weights/changed"]) == (0.0, 0.01)
    assert first["weights/bytes"] == len(store.published[0][1][0].payload) > second["weights/bytes"] > 0


def test_what_is_out_has_a_checksum_and_a_keyframe(store: Store, publisher: Publisher) -> None:
    weights = Weights()
    assert publisher.keyframe_version == -1
    with pytest.raises(WeightsError, match="nothing was published"):
        publisher.checksum()
    with ThreadPoolExecutor(1) as pool:
        for version in (3, 4):
            weights.value = version
            publisher.publish(version, weights, consumed=0)
            publisher.flush()
            assert publisher.checksum() == State.of_torch(version, dict(weights.published())).checksum(pool)
            assert publisher.keyframe_version == 3
    store.error, weights.value = WeightsError("full disk"), 9.0
    publisher.publish(5, weights, consumed=0)
    before = publisher.checksum()
    with pytest.raises(WeightsError):
        publisher.flush()
    assert publisher.checksum() == before


def test_versions_go_out_in_order_and_waiting_is_counted(store: Store, publisher: Publisher) -> None:
    assert publisher.take_stall_s() == 0.0
    for version in range(5):
        publisher.publish(version, Weights(), consumed=version)
    publisher.flush()
    assert [entry[0] for entry in store.published] == [0, 1, 2, 3, 4]
    assert publisher.take_stall_s() > 0.0
    assert publisher.take_stall_s() == 0.0


@pytest.mark.parametrize("call", ["publish", "flush", "close"])
def test_an_error_of_the_thread_is_raised_by_the_next_call_once(store: Store, publisher: Publisher, call: str) -> None:
    store.error = FencedError("fence 4 owns the run")
    publisher.publish(0, Weights(), consumed=0)
    with pytest.raises(FencedError, match="fence 4"):
        publisher.publish(1, Weights(), consumed=0) if call == "publish" else getattr(publisher, call)()
    assert store.published == []
    publisher.flush()


def test_a_store_that_hangs_ends_the_wait(store: Store) -> None:
    publisher = Publisher(store, run_id="run-1", fence=3, deadline_s=0.01)
    store.gate.clear()
    publisher.publish(0, Weights(), consumed=0)
    with pytest.raises(WeightsError, match=r"took over 0\.01 s"):
        publisher.flush()
    store.gate.set()
    publisher.close()


def test_close_sends_what_is_pending(store: Store) -> None:
    publisher = Publisher(store, run_id="run-1", fence=3)
    publisher.publish(0, Weights(), consumed=0)
    publisher.close()
    assert store.head() == 0
