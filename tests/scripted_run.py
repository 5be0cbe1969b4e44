"""A small run whose actor needs no model: its settings, its file, and who answers its leases."""

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from lambdapo_async.broker.interface import Delivery, Descriptor, EnqueueStatus, RolloutSink
from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.config import RunConfig
from lambdapo_async.errors import RunNotFoundError
from lambdapo_async.rollout import RolloutGroup
from lambdapo_async.wire import encode_group
from tests.random_groups import random_group
from tests.tiny_models import VOCAB


def settings(**changes: object) -> RunConfig:
    tree: dict[str, object] = {
        "model": {"path": "unused", "max_length": 64},
        "task": {"kind": "arithmetic"},
        "sampling": {"max_tokens": 20},
        "rollout": {"group_size": 3, "groups_per_step": 3},
        "learner": {"lr": 1e-3, "weight_decay": 0.1, "micro_batch_tokens": 100},
    }
    for section, values in changes.items():
        tree[section] = {**tree.get(section, {}), **values}  # type: ignore[dict-item]
    return RunConfig.model_validate(tree)


CONFIG_FILE = """
name = "ranks"
[model]
path = "{model}"
max_length = 64
[task]
kind = "arithmetic"
[sampling]
max_tokens = 20
[rollout]
group_size = 3
groups_per_step = 2
[learner]
num_steps = 3
lr = 1e-3
micro_batch_tokens = 100
num_threads = 1
checkpoint_every = 1
keep_checkpoints = 9
[evaluation]
every_steps = 0
[broker]
heartbeat_s = 0.5
"""


class ScriptedActor(threading.Thread):
    """Answers leases one after the other with the group of their number, of version 0, until it is stopped."""

    def __init__(self, url: str, run_id: str, config: RunConfig) -> None:
        super().__init__(daemon=True)
        self._run, self._config = RedisRun(url, run_id, timeout_s=10.0), config
        self._stopping = threading.Event()
        self._producer, self._seq = f"a.{uuid.uuid4().hex[:8]}", 0
        self.problem: BaseException | None = None

    def run(self) -> None:
        try:
            self._answer()
        except BaseException as error:
            self.problem = error
            raise

    def _answer(self) -> None:
        admission, sink = self._run.admission("a"), self._run.sink()
        while not self._stopping.wait(0.02):
            if not self._is_open():
                continue
            for lease in admission.lease(1):
                self._offer(sink, random_group(lease.index, self._config, vocab=VOCAB))

    def _offer(self, sink: RolloutSink, group: RolloutGroup) -> None:
        """Until it is taken; after a loss under a new name, for it remembers nothing of what it sent before."""
        payload = encode_group(group)
        while not self._stopping.wait(0.01):
            if not self._is_open():
                continue
            descriptor = Descriptor(self._producer, self._seq + 1, group.lease, 0, len(payload), 0.5)
            reply = sink.enqueue([Delivery(descriptor, payload)], epoch=self._run.run_store.state().epoch)
            match reply.status:
                case EnqueueStatus.OK:
                    self._seq += 1
                    return
                case EnqueueStatus.LATE:
                    return
                case EnqueueStatus.GAP | EnqueueStatus.DUP:
                    self._producer, self._seq = f"a.{uuid.uuid4().hex[:8]}", 0

    def _is_open(self) -> bool:
        try:
            return self._run.run_store.state().phase == "running"
        except RunNotFoundError:
            return False

    def stop(self) -> None:
        self._stopping.set()
        self.join(30)
        self._run.close()


@contextmanager
def acting(url: str, run_id: str, config: RunConfig) -> Iterator[ScriptedActor]:
    actor = ScriptedActor(url, run_id, config)
    actor.start()
    try:
        yield actor
    finally:
        actor.stop()
