"""Puts a learner together from what it starts with: the checkpoint, the journal behind it, and Redis."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lambdapo_async.broker.interface import RolloutSource, WeightStore
from lambdapo_async.broker.limits import RunLimits
from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.config import RunConfig
from lambdapo_async.journal.history import History
from lambdapo_async.journal.journal import Journal
from lambdapo_async.journal.receipts import Receipts
from lambdapo_async.journal.records import GroupRecord
from lambdapo_async.journal.redo import survey
from lambdapo_async.metrics import EVAL, MetricRow, MetricsLog, read_metrics
from lambdapo_async.packing import TrainingSequence
from lambdapo_async.weights.canary import ModelIdentity
from learner.arrivals import Arrival, Screen
from learner.batcher import Batcher
from learner.canary import LearnerCanary
from learner.checkpoint import Checkpoint, CheckpointStore, LearnerState
from learner.crew import Crew
from learner.evaluation import Evaluation
from learner.fleet_watch import FleetWatch
from learner.ingest import Ingest
from learner.learner import Learner, LearnerParts
from learner.parallel import Ranks
from learner.policy import Policy
from learner.pool import Pool
from learner.publication import Publication, Rows
from learner.publisher import Publisher
from learner.receipt_book import ReceiptBook
from learner.reporting import Reporter
from learner.resync import Resync
from learner.samples import SampleLog
from learner.stepper import Stepper
from learner.trainer import ReferenceLogprobs, Trainer
from learner.versions import VersionCounter

JOURNAL_FOLDER = "journal"
"""Beside the checkpoints, in the run's folder."""


@dataclass(frozen=True, slots=True)
class Start:
    """What a learner starts from."""

    run: RedisRun
    run_id: str
    config: RunConfig
    folder: Path
    fence: int
    journal: Journal
    checkpoints: CheckpointStore
    checkpoint: Checkpoint | None
    policy: Policy
    reference: ReferenceLogprobs | None
    rows: Rows
    scored: Sequence[TrainingSequence]
    """What actors are held to (learner.canary)."""
    ranks: Ranks


def assemble(start: Start, resources: contextlib.ExitStack) -> Learner:
    """A learner that was not started; ``resources`` closes what it holds.

    Raises:
        JournalError, ReplayError: journal and checkpoint do not belong together.
    """
    config, run, policy = start.config, start.run, start.policy
    state = start.checkpoint.state if start.checkpoint else LearnerState(step=0, version=-1)
    journal, receipts = start.journal, Receipts(state.receipts)
    claimed = survey(journal.history.read(state.pool.keep_from), receipts)
    watch = FleetWatch(run.fleet_control(start.fence), run.fleet)
    screen = Screen(config, vocab_size=policy.vocab_size, seal=run.seal, doorkeeper=watch)
    pool = Pool(config, screen, state.pool, members_of(state, journal.history, screen))
    crew, reporter = Crew(start.ranks), _reporter(start, resources, after_step=state.step)
    store = run.weights_for(config.weights)
    head = store.head()
    # Each may know of a version that the others lack: Redis came back empty, or the claim lies before ``keep_from``.
    versions = VersionCounter(journal, newest=max(claimed, state.version, -1 if head is None else head))
    publisher = resources.enter_context(_publisher(start, store, newest_version=versions.newest))
    source, book = run.source(start.fence, RunLimits.of(config)), ReceiptBook(journal, receipts)
    ingest = Ingest(source, book, screen, config, newest_version=lambda: publisher.newest_version)
    resources.callback(ingest.close)
    finished = [row for row in read_metrics(start.folder / "metrics.jsonl") if row.kind == EVAL]
    evaluation = _evaluation(start, source, finished, open_rounds=state.open_rounds)
    resync = Resync(
        checkpoints=start.checkpoints,
        run_store=run.run_store,
        publication=Publication(run.run_store, config, policy.model_files, start.rows, fence=start.fence),
        source=source,
        book=book,
        publisher=publisher,
        versions=versions,
        evaluation=evaluation,
        ingest=ingest,
        ranks=start.ranks,
        fence=start.fence,
        outage_s=config.broker.outage_s,
    )
    identity = ModelIdentity.of(policy.model_files)
    parts = LearnerParts(
        config=config,
        folder=start.folder,
        policy=policy,
        stepper=Stepper(policy, Trainer(policy, config, start.reference, start.ranks), crew, reporter, step=state.step),
        batcher=Batcher(ingest, source, evaluation, pool, journal, config, start.ranks),
        screen=screen,
        journal=journal,
        resync=resync,
        canary=LearnerCanary(run.canary, policy, start.scored, identity=identity, fence=start.fence, crew=crew),
        watch=watch,
        reporter=reporter,
    )
    return Learner(
        parts, resumed=start.checkpoint is not None, target_reached=_reached(config.evaluation.target, finished)
    )


def _reporter(start: Start, resources: contextlib.ExitStack, *, after_step: int) -> Reporter:
    metrics = MetricsLog(start.folder / "metrics.jsonl", after_step=after_step)
    resources.enter_context(metrics)
    samples = SampleLog(start.folder / "samples.jsonl", start.rows.heldout, after_step=after_step)
    resources.enter_context(samples)
    return Reporter(metrics, samples)


def _publisher(start: Start, store: WeightStore, *, newest_version: int) -> Publisher:
    return Publisher(
        store,
        run_id=start.run_id,
        fence=start.fence,
        config=start.config.weights,
        ranks=start.ranks,
        newest_version=newest_version,
    )


def _evaluation(
    start: Start, source: RolloutSource, finished: Sequence[MetricRow], *, open_rounds: Iterable[int]
) -> Evaluation:
    """With the rounds that an earlier life opened and did not finish."""
    evaluation = Evaluation(
        source,
        start.config.evaluation,
        num_rows=len(start.rows.heldout),
        answered={row.step for row in finished},
    )
    for step in open_rounds:
        evaluation.open(step)
    return evaluation


def members_of(state: LearnerState, history: History, screen: Screen) -> Iterator[Arrival]:
    """The groups of a checkpoint's replay queue, from the journal."""
    for number, record in history.read(state.pool.keep_from):
        if number > state.pool.taken:
            return
        if isinstance(record, GroupRecord) and number in state.pool.replay.uses:
            yield screen.restore(number, record)


def _reached(target: float | None, finished: Sequence[MetricRow]) -> bool:
    """Whether an evaluation of an earlier life ends the run."""
    return target is not None and any(row.values["eval/reward"] >= target for row in finished)
