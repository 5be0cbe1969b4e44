"""A whole learner on a run in memory: put together as in production, with an actor that answers at once."""

import contextlib
import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from lambdapo_async.broker.interface import Delivery, Descriptor, EnqueueStatus
from lambdapo_async.config import RunConfig
from lambdapo_async.journal.history import History
from lambdapo_async.journal.journal import Journal
from lambdapo_async.journal.records import GroupRecord, Record, StepRecord
from lambdapo_async.metrics import MetricRow, read_metrics
from lambdapo_async.report.run_folder import write_header
from lambdapo_async.rollout import Lease, RolloutGroup
from lambdapo_async.tasks.interface import Row
from lambdapo_async.weights.canary import Canary
from lambdapo_async.weights.state import State
from lambdapo_async.wire import encode_group
from learner.assembly import JOURNAL_FOLDER, Start, assemble
from learner.canary import canary_sequence
from learner.checkpoint import CheckpointStore
from learner.crew_member import Origin, load_trainees
from learner.parallel import ALONE, Ranks
from learner.policy import Policy
from learner.publication import Rows
from tests.fakes_broker import FakeRun
from tests.groups import make_group
from tests.random_groups import random_group

GROUPS_PER_STEP = 2
_LIVES = itertools.count()
ROWS = Rows(*([Row(prompt=f"{i}+1=", answer=str(i + 1)) for i in range(20)] for _ in range(2)))


def stage_config(**sections: Mapping[str, object]) -> RunConfig:
    tree: dict[str, Mapping[str, object]] = {
        "model": {"path": "unused", "max_length": 64},
        "task": {"kind": "arithmetic"},
        "sampling": {"max_tokens": 16},
        "rollout": {"group_size": 2, "groups_per_step": GROUPS_PER_STEP},
        "staleness": {"max_staleness": 1},
        "learner": {
            "num_steps": 6,
            "checkpoint_every": 2,
            "data_timeout_s": 20.0,
            "micro_batch_tokens": 64,
            "lr": 1e-3,
            "record": True,
        },
        "evaluation": {"every_steps": 0, "num_prompts": 2},
    }
    merged = {name: {**values, **sections.get(name, {})} for name, values in tree.items()}
    return RunConfig.model_validate({**merged, **{n: v for n, v in sections.items() if n not in merged}})


class WatchedCanary:
    """The run's, and beside each canary that goes in the checksum of the policy's weights at that moment."""

    def __init__(self, run: FakeRun, policy: Policy) -> None:
        self._run, self._policy, self._store = run, policy, run.shared.canary
        self.canary, self.ask_canary = self._store.canary, self._store.ask_canary
        self.is_canary_asked = self._store.is_canary_asked
        self.published: list[tuple[Canary, str, int | None]] = []

    def put_canary(self, record: bytes, *, fence: int) -> None:
        self._store.put_canary(record, fence=fence)
        with ThreadPoolExecutor(1) as pool:
            checksum = State.of_torch(0, dict(self._policy.named_bf16())).checksum(pool)
        self.published.append((Canary.from_bytes(record), checksum, self._run.weights.head()))


class Stage:
    """One life of a learner on a run and a folder that outlive it; ``folder/model`` is where it begins."""

    def __init__(self, run: FakeRun, folder: Path, settings: RunConfig, ranks: Ranks = ALONE) -> None:
        self.run = run = FakeRun("run", run.shared)
        self.folder = folder
        write_header(folder, "run", settings)
        checkpoints = CheckpointStore(folder / "checkpoints", ranks)
        fence = checkpoints.take_fence()
        run.run_store.take_over(fence=fence)
        self.resources = contextlib.ExitStack()
        journal = self.resources.enter_context(contextlib.closing(Journal.open(folder / JOURNAL_FOLDER, fence)))
        checkpoint = checkpoints.load_latest(journal.history)
        torch.manual_seed(settings.seed)
        origin = Origin(str(folder / "model"), checkpoint)
        origin.share(ranks)
        self.policy, reference = load_trainees(settings, origin, ranks)
        if ranks.is_alone:  # it looks at the weights, in which other ranks would have to join
            run.canary = self.canary_store = WatchedCanary(run, self.policy)
        start = Start(
            run, "run", settings, folder, fence, journal, checkpoints, checkpoint, self.policy, reference, ROWS,
            [canary_sequence([1, 2], [3, 4])], ranks,
        )  # fmt: skip
        self.learner = assemble(start, self.resources)
        self.parts = self.learner._parts
        self.source = self.parts.resync.source

    def kill(self) -> None:
        """As near to kill -9 as a thread comes: nothing more reaches the disk."""
        self.parts.journal.close()


@contextmanager
def staged(run: FakeRun, folder: Path, settings: RunConfig) -> Iterator[Stage]:
    stage = Stage(run, folder, settings)
    with stage.resources:
        yield stage


class Actor(threading.Thread):
    """Answers leases at once, with the newest version, until it is stopped."""

    def __init__(
        self,
        run: FakeRun,
        settings: RunConfig,
        *,
        actor_id: str = "a",
        heldout_reward: float = 0.5,
        is_wary: bool = False,
        nats_off: float = 0.0,
    ) -> None:
        """A wary one answers each lease only after a canary that it asked for.

        ``nats_off``: what each of its log-probabilities is too low.
        """
        super().__init__(daemon=True)
        self._run, self._settings = FakeRun("run", run.shared), settings
        self._heldout_reward, self._is_wary = heldout_reward, is_wary
        self._actor_id, self._nats_off = actor_id, nats_off
        self._stopping = threading.Event()
        self._producer, self._seq = f"{actor_id}.{next(_LIVES)}", 0
        self.answered: list[str] = []

    def run(self) -> None:
        admission, sink = self._run.admission(self._actor_id), self._run.sink()
        while not self._stopping.wait(0.001):
            for lease in self._choose(admission.lease(4)):
                self._look_at_canary()
                version = self._run.weights.head() or 0
                if lease.split == "heldout":
                    group = make_group(rewards=(self._heldout_reward,), version=version, lease=lease)
                else:
                    group = random_group(lease.index, self._settings, vocab=61, version=version)
                self._offer(sink, group)
                self.answered.append(lease.id)

    def _choose(self, leases: Sequence[Lease]) -> Sequence[Lease]:
        """What of ``leases``, and of those before, is answered now, in order."""
        return leases

    def _look_at_canary(self) -> None:
        if self._is_wary:
            self._run.canary.ask_canary()
        while self._is_wary and self._run.canary.is_canary_asked() and not self._stopping.wait(0.001):
            pass

    def _offer(self, sink, group: RolloutGroup) -> None:
        """Until it is taken; after a loss under a new name, for it remembers nothing of what it sent before."""
        payload = encode_group(self._as_ours(group))
        while not self._stopping.wait(0.0005):
            descriptor = Descriptor(self._producer, self._seq + 1, group.lease, group.min_version, len(payload), 0.5)
            reply = sink.enqueue([Delivery(descriptor, payload)], epoch=self._run.shared.epoch)
            match reply.status:
                case EnqueueStatus.OK:
                    self._seq += 1
                    return
                case EnqueueStatus.LATE:
                    return
                case EnqueueStatus.GAP | EnqueueStatus.DUP:
                    self._producer, self._seq = f"{self._actor_id}.{next(_LIVES)}", 0

    def _as_ours(self, group: RolloutGroup) -> RolloutGroup:
        rollouts = tuple(
            replace(each, behavior_logprobs=each.behavior_logprobs - self._nats_off) for each in group.rollouts
        )
        return replace(group, actor_id=self._actor_id, rollouts=rollouts)

    def stop(self) -> None:
        self._stopping.set()
        self.join(30)


@contextmanager
def acting(run: FakeRun, settings: RunConfig, **character: float) -> Iterator[Actor]:
    actor = Actor(run, settings, **character)
    actor.start()
    try:
        yield actor
    finally:
        actor.stop()


def journal_of(folder: Path) -> list[tuple[int, Record]]:
    history = History.find(folder / JOURNAL_FOLDER)
    return list(history.read(history.first_number))


def trained_in(folder: Path) -> list[str]:
    """Leases in the order in which the journal's steps trained them."""
    records = journal_of(folder)
    leases = {n: record.descriptor.lease.id for n, record in records if isinstance(record, GroupRecord)}
    return [leases[number] for _, step in records if isinstance(step, StepRecord) for number in step.chosen]


def rows_of(folder: Path, kind: str) -> list[MetricRow]:
    return [row for row in read_metrics(folder / "metrics.jsonl") if row.kind == kind]


def is_open(run: FakeRun) -> bool:
    return run.shared.phase == "running"
