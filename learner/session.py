"""Puts a learner together from its config, in the order that crash safety asks for, and runs it.

Under torchrun this is what rank 0 does; the other ranks are in ``learner.crew_member``.
"""

import contextlib
import logging
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from transformers import AutoTokenizer

from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.config import RunConfig
from lambdapo_async.errors import ConfigError, TaskError
from lambdapo_async.journal.journal import Journal
from lambdapo_async.objective.resolve import resolve_objective
from lambdapo_async.report.run_folder import write_header
from lambdapo_async.tasks.interface import Task
from lambdapo_async.tasks.prompts import PromptEncoder, Tokenizer
from lambdapo_async.tasks.registry import build_task
from learner.assembly import JOURNAL_FOLDER, Start, assemble
from learner.canary import canary_sequences
from learner.checkpoint import CheckpointStore
from learner.crew_member import Origin, load_trainees
from learner.fence import unless_fenced
from learner.learner import Learner
from learner.parallel import Ranks
from learner.policy import Policy
from learner.publication import Rows
from learner.rank_process import run_rank
from learner.run_identity import check_same_config, refuse_other_schema, refuse_taken_id
from learner.starter import ensure_starter, is_worth_a_line

logger = logging.getLogger(__name__)


def run_learner(config: RunConfig, *, run_id: str, folder: Path, resume: bool) -> None:
    """Train the run until it is finished or SIGTERM suspends it; every rank that torchrun started calls this.

    Args:
        run_id, folder, resume: rank 0's count.
    """
    run_rank(config, lambda ranks: _lead(config, run_id, folder, ranks, resume=resume))


def _lead(config: RunConfig, run_id: str, folder: Path, ranks: Ranks, *, resume: bool) -> None:
    resolve_objective(config)  # imports what the user wrote
    task = build_task(config)
    logger.info(
        "%d training and %d held-out rows", len(task.train_rows()), len(task.heldout_rows())
    )  # unreadable files end it here, too
    key = config.broker.hmac_key
    run = RedisRun(
        config.broker.url,
        run_id,
        timeout_s=config.broker.timeout_s,
        hmac_key=None if key is None else key.get_secret_value(),
    )
    run.check_reachable()  # a wrong URL or password ends it here, before minutes of work
    if resume:
        check_same_config(folder, config)
        refuse_other_schema(run.run_store)
    else:
        refuse_taken_id(run.run_store, run_id)
    _warn_of_biased_sampling(config)
    model_path = (
        ensure_starter(config, task, progress=_log_starter) if config.model.path == "starter" else config.model.path
    )
    write_header(folder, run_id, config)
    # The fences come first: whatever an older learner still does cannot reach what is loaded from here on.
    checkpoints = CheckpointStore(folder / "checkpoints", ranks)
    fence = checkpoints.take_fence()
    run.run_store.take_over(fence=fence)
    with contextlib.ExitStack() as resources:
        journal = resources.enter_context(contextlib.closing(Journal.open(folder / JOURNAL_FOLDER, fence)))
        with unless_fenced(folder / "checkpoints", fence):
            checkpoint = checkpoints.load_latest(journal.history) if resume else None
            origin = Origin(str(model_path), checkpoint)
            origin.share(ranks)
            policy, reference = load_trainees(config, origin, ranks)
        _check_length(config, policy)
        tokenizer = _load_tokenizer(policy, folder)
        rows = fitting_rows(task, tokenizer, config)
        encoder, splits = PromptEncoder(tokenizer, task, config), (rows.train, rows.heldout)
        scored = canary_sequences(splits, encoder, tokenizer, max_tokens=config.sampling.max_tokens)
        start = Start(
            run, run_id, config, folder, fence, journal, checkpoints, checkpoint, policy, reference, rows, scored, ranks
        )
        learner = assemble(start, resources)
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
    if is_worth_a_line(step, num_steps):
        logger.info("building the starter model: step %d of %d, loss %.3f", step, num_steps, loss)


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
            f"model.max_length = {config.model.max_length} exceeds the {policy.max_positions} positions that "
            f"{config.model.path} can be trained on: lower it"
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
