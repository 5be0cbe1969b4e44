"""A recorded run, trained again: the journal's groups in the journal's order, without Redis and without actors.

``lambdapo replay RUN_FOLDER`` is this module's command. It is the code by which a learner that was killed goes on from
its journal, begun at the first record: with unchanged settings it ends, on the CPU, with the same bits.
"""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from lambdapo_async.cli.errors import run_main
from lambdapo_async.cli.options import DryRun, Overrides
from lambdapo_async.config import RunConfig
from lambdapo_async.config.load import parse_published
from lambdapo_async.errors import ConfigError
from lambdapo_async.journal.history import History
from lambdapo_async.journal.receipts import Receipts
from lambdapo_async.journal.records import StepRecord
from lambdapo_async.journal.redo import survey
from lambdapo_async.metrics import MetricsLog
from lambdapo_async.objective.resolve import resolve_objective
from lambdapo_async.parent_death import die_with_parent
from lambdapo_async.report.run_folder import recorded_config, write_header
from lambdapo_async.tasks.registry import build_task
from lambdapo_async.weights.hf_folder import replace_hf_folder
from lambdapo_async.weights.state import State
from learner.arrivals import Screen
from learner.assembly import JOURNAL_FOLDER
from learner.checkpoint import CheckpointStore, LearnerState
from learner.crew import Crew
from learner.crew_member import Origin, load_trainees
from learner.parallel import Ranks
from learner.policy import Policy
from learner.pool import Pool
from learner.rank_process import run_rank
from learner.reporting import Reporter, Surroundings
from learner.rerun import Rerun
from learner.samples import SampleLog
from learner.starter import ensure_starter
from learner.stepper import Stepper
from learner.trainer import Trainer

logger = logging.getLogger(__name__)

_RECORDED = ("rollout", "staleness", "replay")
"""What decided which groups a step was made of."""


@dataclass(frozen=True, slots=True)
class Recording:
    """A run whose journal is whole."""

    history: History
    config: RunConfig
    """The recorded one, with overrides."""
    num_steps: int

    @classmethod
    def open(cls, run_folder: Path, overrides: Sequence[str] = ()) -> "Recording":
        """Find the journal of a run, which may still go on.

        Raises:
            ConfigError: there is none, or it does not reach back to the first record.
            JournalError: it is damaged.
        """
        history = History.find(run_folder / JOURNAL_FOLDER)
        if history.next_number == history.first_number:
            raise ConfigError(f"{run_folder} holds no journal: name a run's folder, outputs/RUN_ID")
        if history.first_number > 1:
            raise ConfigError(
                f"the journal of {run_folder} begins at record {history.first_number}, older ones were deleted: only a "
                "run with learner.record = true can be replayed"
            )
        config = parse_published(json.dumps(recorded_config(run_folder)).encode(), overrides, run_id=run_folder.name)
        recorded = parse_published(json.dumps(recorded_config(run_folder)).encode(), run_id=run_folder.name)
        for section in _RECORDED:
            if getattr(config, section) != getattr(recorded, section):
                raise ConfigError(f"{section} cannot be changed: the recorded steps are made of what it says")
        num_steps = sum(isinstance(record, StepRecord) for _, record in history.read(1))
        return cls(history, config, num_steps)


def replay(recording: Recording, output: Path) -> None:
    """Train on every step of ``recording``; every rank that torchrun started calls this.

    Args:
        output: gets metrics.jsonl, a checkpoint and ``final/``, as a run's folder.

    Raises:
        ConfigError: ``output`` holds something.
        ReplayError: the steps cannot have been so with these settings.
    """
    run_rank(recording.config, lambda ranks: replay_on(ranks, recording, output))


def replay_on(ranks: Ranks, recording: Recording, output: Path) -> None:
    """Rank 0's part of :func:`replay`."""
    config = recording.config
    resolve_objective(config)
    check_output(output)
    write_header(output, output.name, config)
    model_path = config.model.path
    if model_path == "starter":
        model_path = str(ensure_starter(config, build_task(config)))
    origin = Origin(model_path, None)
    origin.share(ranks)
    policy, reference = load_trainees(config, origin, ranks)
    crew, screen = Crew(ranks), Screen(config, vocab_size=policy.vocab_size)
    pool = Pool(config, screen)
    with (
        MetricsLog(output / "metrics.jsonl") as metrics,
        SampleLog(output / "samples.jsonl", [], after_step=0) as samples,
    ):
        reporter = Reporter(metrics, samples)
        stepper = Stepper(policy, Trainer(policy, config, reference, ranks), crew, reporter, step=0)
        # What actors answered for an evaluation is of the recorded policy, not of this one.
        rerun = Rerun(pool, screen, on_heldout=lambda _: None)
        for record, batch in rerun.steps(recording.history.read(1), step=0):
            trained = stepper.train(batch)
            stepper.report(trained, Surroundings(), version=record.version + 1)
        _save(recording, output, pool, stepper, policy, ranks)
        reporter.event(stepper.step, "finished")
    crew.finish()
    logger.info("trained %d steps again: %s", stepper.step, output)


def _save(recording: Recording, output: Path, pool: Pool, stepper: Stepper, policy: Policy, ranks: Ranks) -> None:
    receipts = Receipts()
    version = max(survey(recording.history.read(1), receipts), 0)
    checkpoints = CheckpointStore(output / "checkpoints", ranks)
    checkpoints.take_fence()
    checkpoints.save(
        LearnerState(step=stepper.step, version=version, receipts=receipts.state(), pool=pool.state()), policy
    )
    stepper.crew.publish()
    state = State.of_torch(version, dict(policy.named_bf16()))
    replace_hf_folder(output / "final", state, policy.model_files)


def check_output(output: Path) -> None:
    """``ConfigError`` unless ``output`` may be written."""
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"{output} is not empty: name another folder with --output")


def command(
    run_folder: Annotated[
        Path, typer.Argument(metavar="RUN_FOLDER", help="Folder of a run with learner.record = true, outputs/RUN_ID.")
    ],
    overrides: Overrides = (),
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Folder to write; default: RUN_FOLDER-replay.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Train on a recorded run again, with any loss settings, without Redis and without actors."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    recording = Recording.open(run_folder, overrides)
    target = output or run_folder.with_name(f"{run_folder.name}-replay")
    if dry_run:
        check_output(target)
        typer.echo(f"would train {recording.num_steps} steps of {run_folder} again, into {target}")
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(os.getppid())  # torchrun gives each process a session of its own
    replay(recording, target)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(command)

if __name__ == "__main__":
    run_main(app)
