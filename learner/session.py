"""Puts a learner together from its config, in the order that crash safety asks for, and runs it.

Under torchrun this is what rank 0 does; the other ranks are in ``learner.crew_member``.
"""

import contextlib
import json
import logging
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from lambdapo_async.broker.interface import Durable, RunLimits
from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.config import RunConfig
from lambdapo_async.errors import ConfigError, TaskError
from lambdapo_async.metrics import EVAL, MetricsLog, read_metrics
from lambdapo_async.objective.resolve import resolve_objective
from lambdapo_async.packing import TrainingSequence
from lambdapo_async.report.run_folder import write_header
from lambdapo_async.tasks.interface import Row, Task
from lambdapo_async.tasks.prompts import PromptEncoder, Tokenizer
from lambdapo_async.tasks.registry import build_task
from lambdapo_async.weights.canary import ModelIdentity
from learner.batcher import Batcher
from learner.canary import LearnerCanary, canary_sequences
from learner.checkpoint import Checkpoint, CheckpointStore, LearnerState
from learner.crew import Crew
from learner.crew_member import Origin, load_trainees, run_member
from learner.evaluation import Evaluation
from learner.ingest import Ingest
from learner.learner import Learner, LearnerParts
from learner.parallel import Ranks, join_ranks
from learner.policy import Policy, pick_device
from learner.publisher import Publisher
from learner.reporting import Reporter
from learner.run_identity import check_same_config, refuse_taken_id
from learner.samples import SampleLog
from learner.starter import ensure_starter
from learner.trainer import ReferenceLogprobs, Trainer
from learner.watermarks import Watermarks

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a run that fit its context."""

    train: list[Row]
    heldout: list[Row]


def run_learner(config: RunConfig, *, run_id: str, folder: Path, resume: bool) -> None:
    """Train the run until it is finished or SIGTERM suspends it; every rank that torchrun started calls this.

    Args:
        run_id, folder, resume: rank 0's count.
    """
    if config.learner.num_threads is not None:
        torch.set_num_threads(config.learner.num_threads)
    torch.manual_seed(config.seed)
    transformers_logging.disable_progress_bar()
    device = pick_device(config.learner.device)
    with join_ranks(device, context_size=config.learner.context_parallel) as ranks:
        if ranks.is_main:
            _lead(config, run_id, folder, ranks, resume=resume)
        else:
            run_member(config, ranks)


def _lead(config: RunConfig, run_id: str, folder: Path, ranks: Ranks, *, resume: bool) -> None:
    resolve_objective(config)  # imports what the user wrote
    task = build_task(config)
    for split in (task.train_rows(), task.heldout_rows()):  # unreadable files end it here, too
        logger.info("%d rows", len(split))
    run = RedisRun(config.broker.url, run_id, timeout_s=config.broker.timeout_s)
    run.check_reachable()  # a wrong URL or password ends it here, before minutes of work
    if resume:
        check_same_config(folder, config)
    else:
        refuse_taken_id(run.run_store, run_id)
    _warn_of_biased_sampling(config)
    model_path = (
        ensure_starter(config, task, progress=_log_starter) if config.model.path == "starter" else config.model.path
    )
    write_header(folder, run_id, config)
    # The fence comes first: whatever an older learner still does cannot reach what is loaded from here on.
    checkpoints = CheckpointStore(folder / "checkpoints", ranks)
    fence = checkpoints.take_fence()
    checkpoint = checkpoints.load_latest() if resume else None
    origin = Origin(str(model_path), checkpoint)
    origin.share(ranks)
    policy, reference = load_trainees(config, origin, ranks)
    _check_length(config, policy)
    tokenizer = _load_tokenizer(policy, folder)
    rows = fitting_rows(task, tokenizer, config)
    _publish_run(run, config, policy, rows, fence=fence)
    encoder, splits = PromptEncoder(tokenizer, task, config), (rows.train, rows.heldout)
    scored = canary_sequences(splits, encoder, tokenizer, max_tokens=config.sampling.max_tokens)
    with contextlib.ExitStack() as resources:
        start = _Start(
            run, run_id, config, folder, fence, checkpoints, checkpoint, policy, reference, rows, scored, ranks
        )
        learner = _assemble(start, resources)
        with _stop_on_signals(learner):
            learner.run()


def _warn_of_biased_sampling(config: RunConfig) -> None:
    if config.sampling.top_p != 1.0 or config.sampling.top_k != -1:
        logger.warning(
            "sampling.top_p = %g and top_k = %d: the recorded log-probabilities are of the cut distribution, which "
            "biases the ratio to the learner's",
            config.sampling.top_p, config.sampling.top_k,
        )  # fmt: skip


def _log_starter(step: int, num_steps: int, loss: float) -> None:
    logger.info("building the starter model: step %d of %d, loss %.3f", step, num_steps, loss)


@dataclass(frozen=True, slots=True)
class _Start:
    """What a learner starts from."""

    run: RedisRun
    run_id: str
    config: RunConfig
    folder: Path
    fence: int
    checkpoints: CheckpointStore
    checkpoint: Checkpoint | None
    policy: Policy
    reference: ReferenceLogprobs | None
    rows: Rows
    scored: Sequence[TrainingSequence]
    """What actors are held to (learner.canary)."""
    ranks: Ranks


def _load_tokenizer(policy: Policy, folder: Path) -> Tokenizer:
    """The tokenizer that the actors will get: from the model's companion files, kept with the run."""
    target = folder / "model_files"
    target.mkdir(parents=True, exist_ok=True)
    for name, content in policy.model_files.items():
        (target / name).write_bytes(content)
    tokenizer: Tokenizer = AutoTokenizer.from_pretrained(target)
    return tokenizer


def _check_length(config: RunConfig, policy: Policy) -> None:
    if config.model.max_length > policy.max_positions:
        raise ConfigError(
            f"model.max_length = {config.model.max_length} exceeds the {policy.max_positions} positions of "
            f"{config.model.path}: lower it"
        )
    logger.info("policy with %.2f M parameters on %s", policy.num_parameters / 1e6, policy.device)


def fitting_rows(task: Task, tokenizer: Tokenizer, config: RunConfig) -> Rows:
    """Leave out rows whose prompts leave no room for the longest completion; they are counted in the log.

    Raises:
        TaskError: none is left.
    """
    encoder = PromptEncoder(tokenizer, task, config)
    splits = []
    for split, rows in (("training", task.train_rows()), ("held-out", task.heldout_rows())):
        fitting = [row for row in rows if encoder.fits(row)]
        if len(fitting) < len(rows):
            logger.warning(
                "left out %d of %d %s rows: their prompts exceed %d tokens (model.max_length - sampling.max_tokens)",
                len(rows) - len(fitting), len(rows), split, encoder.max_tokens,
            )  # fmt: skip
        if not fitting:
            raise TaskError(
                f"none of {len(rows)} {split} rows fits: prompts may have {encoder.max_tokens} tokens; "
                "raise model.max_length or lower sampling.max_tokens"
            )
        splits.append(fitting)
    return Rows(*splits)


def _publish_run(run: RedisRun, config: RunConfig, policy: Policy, rows: Rows, *, fence: int) -> None:
    """Everything an actor needs to join, but the weights."""
    run.run_store.create(json.dumps(config.published()).encode(), policy.model_files, fence=fence)
    run.run_store.put_rows("train", [row.as_map() for row in rows.train])
    run.run_store.put_rows("heldout", [row.as_map() for row in rows.heldout])


def _assemble(start: _Start, resources: contextlib.ExitStack) -> Learner:
    config, run, policy = start.config, start.run, start.policy
    fresh = LearnerState(step=0, version=0, consumed=0, next_index=0, watermarks={}, totals={})
    state = start.checkpoint.state if start.checkpoint else fresh
    source = run.source(start.fence, RunLimits.of(config))
    source.initialise(
        Durable(watermarks=state.watermarks, consumed=state.consumed, waiting=0, next_index=state.next_index, holes=())
    )
    metrics = resources.enter_context(MetricsLog(start.folder / "metrics.jsonl", after_step=state.step))
    samples = resources.enter_context(
        SampleLog(start.folder / "samples.jsonl", start.rows.heldout, after_step=state.step)
    )
    store = run.weights_for(config.weights)
    publisher = Publisher(store, run_id=start.run_id, fence=start.fence, config=config.weights, ranks=start.ranks)
    resources.callback(publisher.close)
    ingest = Ingest(source, config, vocab_size=policy.vocab_size, newest_version=lambda: publisher.newest_version)
    resources.callback(ingest.close)
    ingest.start()
    answered = {row.step for row in read_metrics(start.folder / "metrics.jsonl") if row.kind == EVAL}
    evaluation = Evaluation(source, config.evaluation, num_rows=len(start.rows.heldout), answered=answered)
    batcher = Batcher(
        ingest,
        source,
        evaluation,
        config,
        watermarks=Watermarks(state.watermarks),
        consumed=state.consumed,
        next_index=state.next_index,
        ranks=start.ranks,
    )
    crew = Crew(start.ranks)
    identity = ModelIdentity.of(policy.model_files)
    parts = LearnerParts(
        config=config,
        fence=start.fence,
        policy=policy,
        trainer=Trainer(policy, config, start.reference, start.ranks),
        batcher=batcher,
        evaluation=evaluation,
        publisher=publisher,
        canary=LearnerCanary(run.canary, policy, start.scored, identity=identity, fence=start.fence, crew=crew),
        checkpoints=start.checkpoints,
        source=source,
        run_store=run.run_store,
        fleet=run.fleet,
        reporter=Reporter(metrics, samples, totals=state.totals),
        crew=crew,
    )
    version = _first_version(state, store.head())
    return Learner(parts, step=state.step, version=version, resumed=start.checkpoint is not None)


def _first_version(state: LearnerState, head: int | None) -> int:
    """A number names one set of weights for ever: after a crash we go on above everything that was out."""
    return state.version if head is None else max(state.version, head) + 1


@contextlib.contextmanager
def _stop_on_signals(learner: Learner) -> Iterator[None]:
    """The first SIGTERM or Ctrl-C suspends after the running step; the next one has its usual effect."""

    def stop_once(number: int, _: FrameType | None) -> None:
        logger.info("%s: stopping after this step", signal.Signals(number).name)
        signal.signal(number, previous[signal.Signals(number)])
        learner.stop()

    previous = {number: signal.signal(number, stop_once) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
