"""A learner under faults: the product's own ``python -m learner``, with a policy that only counts.

The two replaced names, ``load_trainees`` and ``Trainer``, are the maths; fence, checkpoints, journal, ingest, publisher
and Redis are assembled by ``learner.session`` as in production.
"""

import faulthandler
import os
import signal
import sys
from typing import Any

import learner.session as session
from lambdapo_async.broker.interface import Descriptor
from lambdapo_async.broker.rollout_source import RedisRolloutSource
from lambdapo_async.broker.run_store import RedisRunStore
from lambdapo_async.parent_death import die_with_parent
from lambdapo_async.weights.redis_store import RedisWeightStore
from learner import checkpoint as checkpoint_module
from learner.batcher import Batcher
from learner.character_tokenizer import build_tokenizer
from learner.checkpoint import CheckpointStore
from learner.crew_member import Origin
from learner.ingest import Discarded, Ingest
from learner.publisher import Publisher
from tests.chaos.counting_policy import CountingPolicy, CountingTrainer, name_of_weights
from tests.chaos.fault_points import LEARNER_POINTS, FaultPoints
from tests.chaos.ledger import Field, Ledger, digest
from tests.chaos.spec import RUN_ID, ProcessSpec


def run_learner_process(spec: ProcessSpec, parent_pid: int) -> None:
    """Target of a forked process; never returns."""
    become(spec, parent_pid)
    ledger = Ledger(spec.folder, spec.who)
    ledger.write("started", pid=os.getpid(), resume=spec.resume)
    points = FaultPoints(spec.folder, spec.who, ledger)
    _replace_maths(ledger, spec, points)
    _tap(points, ledger)
    from lambdapo_async.cli.errors import run_main
    from learner.__main__ import app

    resume = ["--resume"] if spec.resume else []
    run_main(app, [str(spec.config_path), "--run-id", RUN_ID, "--redis-url", spec.url, *resume])


def become(spec: ProcessSpec, parent_pid: int) -> None:
    """A process like one that a shell started: own session, output in its log, stacks on SIGUSR1."""
    die_with_parent(parent_pid)
    os.setsid()
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
    session.Trainer = trainer  # type: ignore[assignment, misc]
    points.tap(CountingTrainer, "step", "train")


def model_files(spec: ProcessSpec) -> dict[str, bytes]:
    """Tokenizer files, made once per scene."""
    folder = spec.folder / "tokenizer"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_model_files(spec_folder: Any) -> None:
    build_tokenizer(24).save_pretrained(spec_folder / "tokenizer")
    (spec_folder / "tokenizer" / "config.json").write_text('{"model_type": "qwen3"}')


def _tap(points: FaultPoints, ledger: Ledger) -> None:
    """Points around every call whose order matters, and what the ledger has to know."""

    def received(deliveries: Any, *_: object, **__: object) -> None:
        for delivery in deliveries:
            if delivery.descriptor.lease.split == "train":
                ledger.write("received", **_fields(delivery.descriptor))

    def sorted_out(result: Any, *_: object, **__: object) -> None:
        if isinstance(result, Discarded) and result.descriptor.lease.split == "train":
            ledger.write("discarded", **_fields(result.descriptor), reason=result.reason)

    def dropped(_: Any, __: Any, received: Any, batch: Any, version: int) -> None:
        if received.group is not None and not any(received is kept for kept in batch.groups):
            ledger.write("discarded", **_fields(received.descriptor), reason="late or without signal")

    def saved(path: Any, _: Any, state: Any, policy: CountingPolicy) -> None:
        ledger.write("checkpoint", step=state.step, version=state.version, digest=digest(policy.history))

    announced: dict[int, str] = {}

    def announce(_: Any, version: int, policy: CountingPolicy, **__: object) -> None:
        announced[version] = name_of_weights(dict(policy.named_bf16())["digest"])

    def flipped(_: Any, __: Any, version: int, *___: object, **____: object) -> None:
        ledger.write("published", version=version, weights=announced[version])

    def committed(_: Any, __: Any, watermarks: Any) -> None:
        ledger.write("committed", watermarks=dict(watermarks))

    def initialised(_: Any, __: Any, *args: Any, **named: Any) -> None:
        ledger.write("initialised", to=repr(args or named)[:2000])

    points.tap(CheckpointStore, "take_fence", "fence", after=lambda fence, _: ledger.write("claimed", fence=fence))
    points.tap(CheckpointStore, "load_latest", "load")
    points.tap(CheckpointStore, "save", "save", after=saved)
    points.tap(CheckpointStore, "prune", "prune")
    points.tap(checkpoint_module, "sync_tree", "renamed")
    points.tap(RedisRunStore, "create", "create")
    points.tap(RedisRunStore, "put_rows", "rows")
    points.tap(RedisRunStore, "set_phase", "phase")
    points.tap(RedisRolloutSource, "initialise", "initialise", after=initialised)
    points.tap(RedisRolloutSource, "read", "read", after=received)
    points.tap(RedisRolloutSource, "commit", "commit", after=committed)
    points.tap(RedisRolloutSource, "release", "release")
    points.tap(Ingest, "_receive", "receive", after=sorted_out)
    points.tap(Batcher, "_sort", "sort", after=dropped)
    points.tap(Publisher, "publish", "publish", before=announce)
    points.tap(RedisWeightStore, "publish", "flip", after=flipped)
    points.tap(os, "fsync", "fsync")
    points.tap_scripts()
    points.check(LEARNER_POINTS)


def _fields(of: Descriptor) -> dict[str, Field]:
    return {"producer": of.producer, "seq": of.seq, "index": of.lease.index}
