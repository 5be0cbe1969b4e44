"""What actors read and no read of the queue touches: the learner sees that a key of it is gone, and writes it again."""

from collections.abc import Callable, Iterator

import pytest
import redis
import torch
from torch import Tensor

from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.config.weights import WeightsConfig
from lambdapo_async.weights.manifest import CHUNK_BYTES
from learner.publication import Publication
from learner.publisher import Publisher
from tests.contract.broker_world import start
from tests.learner_stage import ROWS, stage_config
from tests.redis_fixtures import BrokerRun
from tests.weight_files import full, names, publish, step

Evict = Callable[[RedisRun, redis.Redis], object]

PUBLICATION: dict[str, Evict] = {
    "config": lambda run, server: server.delete(run.keys.config),
    "model files": lambda run, server: server.delete(run.keys.model_files),
    "a model file": lambda run, server: server.hdel(run.keys.model_files, "b"),
    "train rows": lambda run, server: server.delete(run.keys.rows("train")),
    "heldout rows": lambda run, server: server.delete(run.keys.rows("heldout")),
    "rows of an older run": lambda run, server: server.hset(run.keys.state, "rows_train", 19),
}
WEIGHTS: dict[str, Evict] = {
    "head": lambda run, server: server.delete(run.keys.weights_head),
    "files": lambda run, server: server.delete(run.keys.weights_files),
    "manifests": lambda run, server: server.delete(run.keys.weights_begun),
    "a manifest": lambda run, server: server.hdel(run.keys.weights_begun, "0.full"),
    "a piece": lambda run, server: server.delete(run.keys.weights_chunk("0.full", 1)),
    "a step's piece": lambda run, server: server.delete(run.keys.weights_chunk("1.step", 0)),
}


@pytest.mark.parametrize("victim", PUBLICATION)
def test_a_lost_part_of_the_publication_is_seen_and_written_again(
    redis_run: RedisRun, server: redis.Redis, victim: str
) -> None:
    files = {"a": b"1", "b": b"2"}
    publication = Publication(redis_run.run_store, stage_config(), files, ROWS, fence=1)
    publication.write()
    assert (publication.looks_whole(), publication.is_there()) == (True, True)
    PUBLICATION[victim](redis_run, server)
    assert (publication.looks_whole(), publication.is_there()) == (False, False)
    publication.write()
    assert (publication.looks_whole(), publication.is_there()) == (True, True)
    assert redis_run.run_store.model_files() == files
    assert redis_run.run_store.row("heldout", 19) == ROWS.heldout[19].as_map()


def test_numbers_tell_whether_a_run_is_published(broker_run: BrokerRun) -> None:
    store, rows = broker_run.run_store, [{"prompt": "p"}] * 300
    assert not store.is_published(num_files=0, num_rows={})
    store.create(b"{}", {"a": b"1"}, fence=1)
    assert store.is_published(num_files=1, num_rows={})
    assert not store.is_published(num_files=2, num_rows={})
    assert not store.is_published(num_files=1, num_rows={"train": 300})
    store.put_rows("train", rows)
    assert store.is_published(num_files=1, num_rows={"train": 300})
    assert not store.is_published(num_files=1, num_rows={"train": 299})


class Policy:
    """Random bits, which do not compress: more than one piece."""

    def __init__(self) -> None:
        bits = torch.randint(-(2**15), 2**15, (CHUNK_BYTES,), generator=torch.Generator().manual_seed(0))
        self._weight = bits.to(torch.int16).view(torch.bfloat16)

    def published(self) -> Iterator[tuple[str, Tensor]]:
        yield "w", self._weight

    def train(self) -> None:
        self._weight = self._weight.clone()
        self._weight[:100] = 1.0


@pytest.mark.parametrize("victim", WEIGHTS)
def test_a_lost_part_of_the_weights_is_seen_and_published_again(
    redis_run: RedisRun, server: redis.Redis, victim: str
) -> None:
    start(redis_run)
    store, policy = redis_run.weights, Policy()
    with Publisher(store, run_id=redis_run.keys.run_id, fence=1) as publisher:
        publisher.publish(0, policy, consumed=0)
        policy.train()
        publisher.publish(1, policy, consumed=0)
        publisher.flush()
        assert names(store) == [(0, None, None), (1, 0, None)]
        assert publisher.is_out()
        WEIGHTS[victim](redis_run, server)
        assert not publisher.is_out()
        publisher.republish(2, consumed=0)
        assert (publisher.is_out(), store.head(), store.lost()) == (True, 2, ())
    for file in store.files():  # what is listed can be had, whatever was lost
        assert len(store.fetch(file)) == file.num_bytes
    assert (2, None, None) in names(store)


def test_a_file_that_lost_a_part_leaves_the_list_with_the_next_publish(started: RedisRun, server: redis.Redis) -> None:
    publish(started.weights, full(0, bytes(3 * CHUNK_BYTES)))
    publish(started.weights, step(1))
    assert started.weights.lost() == ()
    server.delete(started.keys.weights_chunk("0.full", 2))
    assert [file.version for file in started.weights.lost()] == [0]
    publish(started.weights, full(2))
    assert names(started.weights) == [(1, 0, None), (2, None, None)]
    assert server.exists(*(started.keys.weights_chunk("0.full", index) for index in range(3))) == 0


def test_of_files_that_lie_elsewhere_the_manifest_counts(started: RedisRun, server: redis.Redis, tmp_path) -> None:
    store = started.weights_for(WeightsConfig(store=f"file://{tmp_path}"))
    publish(store, full(0))
    publish(store, step(1))
    assert store.lost() == ()
    server.hdel(started.keys.weights_begun, "0.full")
    assert [file.version for file in store.lost()] == [0]
    server.delete(started.keys.weights_begun)
    assert [file.version for file in store.lost()] == [0, 1]
