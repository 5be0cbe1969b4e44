import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lambdapo_async.errors import FencedError, WeightsError
from lambdapo_async.weights.safetensors_file import verify_payload
from learner.publisher import Publisher


class Weights:
    """A policy of one tensor."""

    def __init__(self) -> None:
        self.value = 0.0

    def named_bf16(self) -> Iterator[tuple[str, Tensor]]:
        yield "w", torch.full((3,), self.value, dtype=torch.bfloat16)


class Store:
    """A weight store that publishes when it is let, and raises what it is told to."""

    def __init__(self) -> None:
        self.published: list[tuple[int, bytes, int, int]] = []
        self.threads: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.error: Exception | None = None

    def publish(self, version: int, payload: bytes, *, consumed: int, fence: int) -> None:
        self.entered.set()
        assert self.gate.wait(30)
        if self.error is not None:
            raise self.error
        self.threads.append(threading.current_thread().name)
        self.published.append((version, payload, consumed, fence))

    def head(self) -> int | None:
        return self.published[-1][0] if self.published else None

    def wait_newer(self, than: int, *, timeout_s: float) -> int | None:
        raise NotImplementedError

    def fetch(self, version: int) -> bytes:
        raise NotImplementedError


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
    version, payload, consumed, fence = store.published[0]
    assert (version, consumed, fence, publisher.newest_version) == (5, 48, 3, 5)
    verify_payload(payload, run_id="run-1", version=5)


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
    first, second = (payload for _, payload, _, _ in store.published)
    assert first[-6:] == torch.zeros(3, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    assert second[-6:] == torch.full((3,), 9.0, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    assert set(store.threads) == {"publisher_0"}


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
