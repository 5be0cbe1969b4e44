"""A learner under faults: the product's own ``python -m learner``, with a policy that only counts.

The two replaced names, ``load_trainees`` and ``Trainer``, are the maths; fence, checkpoints, journal, ingest, publisher
and Redis are assembled by ``learner.session`` as in production.
"""

import faulthandler
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

import learner.assembly as assembly
import learner.session as session
from lambdapo_async.broker.interface import Delivery, Descriptor, Durable
from lambdapo_async.broker.rollout_source import RedisRolloutSource
from lambdapo_async.broker.run_store import RedisRunStore
from lambdapo_async.config.load import HMAC_KEY_VARIABLE
from lambdapo_async.journal.journal import Journal
from lambdapo_async.journal.records import GroupRecord, Record, StepRecord
from lambdapo_async.parent_death import die_with_parent
from lambdapo_async.replay.queue import ReplayEntry, ReplayQueue
from lambdapo_async.weights.redis_store import RedisWeightStore
from lambdapo_async.weights.state import State
from learner import checkpoint as checkpoint_module
from learner.arrivals import Arrival, ReceivedGroup
from learner.character_tokenizer import build_tokenizer
from learner.checkpoint import CheckpointStore, LearnerState
from learner.crew_member import Origin
from learner.pool import Pool, StepBatch
from learner.publisher import Publisher
from learner.receipt_book import ReceiptBook
from tests.chaos.counting_policy import CountingPolicy, CountingTrainer, name_of_weights
from tests.chaos.fault_points import LEARNER_POINTS, FaultPoints
from tests.chaos.ledger import Field, Ledger, digest
from tests.chaos.mutants import install
from tests.chaos.spec import RUN_ID, ProcessSpec


def run_learner_process(spec: ProcessSpec, parent_pid: int) -> None:
    """Target of a forked process; never returns."""
    become(spec, parent_pid)
    ledger = Ledger(spec.folder, spec.who)
    ledger.write("started", pid=os.getpid(), resume=spec.resume)
    install(spec.mutant)
    points = FaultPoints(spec.folder, spec.who, ledger)
    _replace_maths(ledger, spec, points)
    _Taps(points, ledger).install()
    from lambdapo_async.cli.errors import run_main
    from learner.__main__ import app

    resume = ["--resume"] if spec.resume else []
    run_main(app, [str(spec.config_path), "--run-id", RUN_ID, "--redis-url", spec.url, *resume])


def become(spec: ProcessSpec, parent_pid: int) -> None:
    """A process like one that a shell started: own session, output in its log, stacks on SIGUSR1."""
    die_with_parent(parent_pid)
    os.setsid()
    if spec.hmac_key:
        os.environ[HMAC_KEY_VARIABLE] = spec.hmac_key
    log = os.open(spec.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    faulthandler.enable()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _replace_maths(ledger: Ledger, spec: ProcessSpec, points: FaultPoints) -> None:
    def load_trainees(config: Any, origin: Origin, ranks: Any) -> tuple[Any, None]:
        if origin.checkpoint is None:
            policy = CountingPolicy([], model_files(spec))
        else:
            policy = CountingPolicy.load(origin.checkpoint.model_dir, model_files(spec))
            origin.checkpoint.restore(policy, ranks)  # type: ignore[arg-type]
        ledger.write("resumed", step=len(policy.history))
        return policy, None

    def trainer(policy: Any, config: Any, *_: object) -> CountingTrainer:
        return CountingTrainer(policy, config, ledger)

    session.load_trainees = load_trainees  # type: ignore[assignment]
    assembly.Trainer = trainer  # type: ignore[assignment, misc]
    points.tap(CountingTrainer, "step", "train")


def model_files(spec: ProcessSpec) -> dict[str, bytes]:
    """Tokenizer files, made once per scene."""
    folder = spec.folder / "tokenizer"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_model_files(spec_folder: Any) -> None:
    build_tokenizer(512).save_pretrained(spec_folder / "tokenizer")
    (spec_folder / "tokenizer" / "config.json").write_text('{"model_type": "qwen3"}')


class _Taps:
    """Points around every call whose order matters, and what the ledger has to know of it."""

    def __init__(self, points: FaultPoints, ledger: Ledger) -> None:
        self._points, self._ledger = points, ledger
        self._weights: dict[int, str] = {}
        self._sampled: dict[int, list[Field]] = {}

    def install(self) -> None:
        tap = self._points.tap
        tap(CheckpointStore, "take_fence", "fence", after=self._took_fence)
        tap(CheckpointStore, "load_latest", "load")
        tap(CheckpointStore, "save", "save", after=self._saved)
        tap(CheckpointStore, "prune", "prune")
        tap(checkpoint_module, "sync_tree", "renamed")
        tap(Journal, "open", "open", after=self._opened)
        tap(Journal, "append", "append", after=self._appended)
        tap(Journal, "prune", "forget")
        tap(ReceiptBook, "enter", "enter", after=self._entered)
        tap(Pool, "sample", "sample", after=self._chose)
        tap(Pool, "offer", "offer", after=self._offered)
        tap(ReplayQueue, "_note_drop", "drop", before=self._dropped)
        tap(RedisRunStore, "create", "create")
        tap(RedisRunStore, "put_rows", "rows")
        tap(RedisRunStore, "set_phase", "phase")
        tap(RedisRolloutSource, "initialise", "initialise", after=self._initialised)
        tap(RedisRolloutSource, "read", "read", after=self._received)
        tap(RedisRolloutSource, "commit", "commit", after=self._committed)
        tap(RedisRolloutSource, "release", "release")
        tap(Publisher, "publish", "publish")
        tap(Publisher, "republish", "republish")
        tap(Publisher, "_send", "send", before=self._send)
        tap(RedisWeightStore, "publish", "flip", after=self._published)
        tap(os, "fsync", "fsync")
        self._points.tap_scripts()
        self._points.check(LEARNER_POINTS)

    def _took_fence(self, fence: int, _: object) -> None:
        self._ledger.write("claimed", fence=fence)

    def _opened(self, journal: Journal, *_: object) -> None:
        self._ledger.write("opened", next=journal.next_number)

    def _saved(self, _: object, __: object, state: LearnerState, policy: CountingPolicy) -> None:
        self._ledger.write("checkpoint", step=state.step, version=state.version, digest=digest(policy.history))

    def _received(self, deliveries: Sequence[Delivery], *_: object, **__: object) -> None:
        for delivery in deliveries:
            if delivery.descriptor.lease.split == "train":
                self._ledger.write("received", **_fields(delivery.descriptor))

    def _entered(self, entered: Sequence[tuple[int, GroupRecord]], *_: object) -> None:
        for _number, record in entered:
            if record.discarded and record.descriptor.lease.split == "train":
                self._ledger.write("discarded", **_fields(record.descriptor), reason=record.discarded)

    def _offered(self, _: bool, __: object, arrival: Arrival) -> None:
        """Again, for a learner that died between writing a discard down and saying so."""
        if arrival.record.discarded and arrival.is_training:
            self._ledger.write("discarded", **_fields(arrival.record.descriptor), reason=arrival.record.discarded)

    def _dropped(self, _: object, entry: ReplayEntry[ReceivedGroup], reason: str, uses: int) -> None:
        if uses == 0:
            self._ledger.write("discarded", **_fields(entry.item.descriptor), reason=reason)

    def _chose(self, chosen: tuple[StepRecord, StepBatch], *_: object) -> None:
        record, batch = chosen
        self._sampled[record.step] = [received.descriptor.lease.index for received in batch.groups]

    def _appended(self, numbers: range, _: object, records: Sequence[Record]) -> None:
        for number, record in zip(numbers, records, strict=True):
            if isinstance(record, StepRecord):
                self._ledger.write("step", number=number, step=record.step, indices=self._sampled[record.step])

    def _initialised(self, _: object, __: object, durable: Durable) -> None:
        self._ledger.write("initialised", to=repr(durable)[:2000])

    def _committed(self, _: object, __: object, watermarks: Mapping[str, int], **___: object) -> None:
        self._ledger.write("committed", watermarks=dict(watermarks))

    def _send(self, _: object, state: State, *__: object, **___: object) -> None:
        bits = torch.from_numpy(state.tensors["digest"].bits.view(np.int16).copy())
        self._weights[state.version] = name_of_weights(bits.view(torch.bfloat16))

    def _published(self, _: object, __: object, version: int, *___: object, **____: object) -> None:
        self._ledger.write("published", version=version, weights=self._weights[version])


def _fields(of: Descriptor) -> dict[str, Field]:
    return {"producer": of.producer, "seq": of.seq, "index": of.lease.index}
