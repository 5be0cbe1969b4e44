"""``lambdapo demo``: one run end to end on this machine."""

import datetime
import os
import shlex
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lambdapo_async.cli.actor_pool import ACTOR_COMMAND, NURSERY_COMMAND, ActorPool, NurseryPool, ProcessPool
from lambdapo_async.cli.demo_run import DemoParts, DemoRun
from lambdapo_async.cli.progress import Progress
from lambdapo_async.cli.progress_view import open_view
from lambdapo_async.cli.supervise import Supervisor, exit_on_termination
from lambdapo_async.config import RunConfig, load_config
from lambdapo_async.config.load import REDIS_URL_VARIABLE
from lambdapo_async.durable import explaining_refusal
from lambdapo_async.errors import ConfigError, DiskError
from lambdapo_async.report.machine import gpu_names
from lambdapo_async.report.run_folder import metrics_path, read_run
from lambdapo_async.report.summary import Summary, summarise

_DEMO_URL = "redis://of-the-demo"  # stands for the URL that the processes will find in their environment


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoPlan:
    """A demo that is about to start."""

    config_path: Path
    overrides: tuple[str, ...]
    config: RunConfig
    target: float
    run_id: str
    num_actors: int
    is_gpu: bool

    @property
    def folder(self) -> Path:
        """Everything the run writes."""
        return self.config.output_dir / self.run_id

    @property
    def logs(self) -> Path:
        """One log per process."""
        return self.folder / "logs"

    @property
    def learner_command(self) -> list[str]:
        """How the learner is started; Redis reaches it through the environment."""
        overrides = [argument for override in self.overrides for argument in ("--set", override)]
        return [sys.executable, "-m", "learner", str(self.config_path), "--run-id", self.run_id, *overrides]

    @property
    def actor_arguments(self) -> list[str]:
        """What follows ``python -m actors``."""
        return ["--run-id", self.run_id]

    def describe(self) -> str:
        """What would be started, as commands."""
        redis = "the Redis of REDIS_URL" if os.environ.get(REDIS_URL_VARIABLE) else "a private Redis"
        actors = (*ACTOR_COMMAND, *self.actor_arguments) if self.is_gpu else NURSERY_COMMAND
        return (
            f"would use {redis} and write to {self.folder}\n"
            f"would start {shlex.join(self.learner_command)}\n"
            f"would start {shlex.join(actors)} for {self.num_actors} actors, kill one half-way and start another\n"
            f"would stop at held-out reward {self.target:g} or step {self.config.learner.num_steps}"
        )


def plan_demo(config_path: Path, overrides: tuple[str, ...], *, run_id: str | None, num_actors: int) -> DemoPlan:
    """Check everything that can be wrong before a process starts.

    Raises:
        ConfigError: a wrong config, one without the target and evaluations that end a demo, or another Redis in
            ``overrides``: all processes must meet in the demo's.
    """
    config = load_config(config_path, overrides, environ={REDIS_URL_VARIABLE: _DEMO_URL})
    if config.broker.url != _DEMO_URL:
        raise ConfigError(f"a demo chooses its Redis itself: leave broker.url out, or set {REDIS_URL_VARIABLE}")
    target = config.evaluation.target
    if target is None or config.evaluation.every_steps == 0:
        raise ConfigError(
            f"{config_path}: a demo runs until a held-out reward is reached: "
            "set evaluation.target and evaluation.every_steps"
        )
    plan = DemoPlan(
        config_path=config_path,
        overrides=overrides,
        config=config,
        target=target,
        run_id=run_id or f"{config.name}-{datetime.datetime.now():%Y%m%d-%H%M%S}",
        num_actors=num_actors,
        is_gpu=bool(gpu_names()),
    )
    if metrics_path(plan.folder).exists():
        raise ConfigError(f"{plan.folder} already holds a run: choose another --run-id")
    return plan


def run_demo(plan: DemoPlan, console: Console) -> Summary:
    """Run it and leave a report; every process it started is gone when it returns or raises.

    Raises:
        BrokerUnreachableError: there is no Redis at REDIS_URL.
        DiskError: the run's folder cannot be made.
        LambdaPOError: a process failed; the message ends with its log's last lines.
    """
    with explaining_refusal(plan.folder, DiskError):
        plan.logs.mkdir(parents=True, exist_ok=True)
    console.print(f"run {plan.run_id}, logs in {plan.logs}", markup=False, highlight=False, soft_wrap=True)
    with ExitStack() as stack:
        stack.enter_context(exit_on_termination())
        try:
            DemoRun(_assemble(plan, console, stack), _progress(plan)).run()
        except KeyboardInterrupt:
            console.print("stopping every process; once more stops them at once")
            raise
    return summarise(read_run(plan.folder).rows, target=plan.target)


def print_summary(summary: Summary, console: Console) -> None:
    """The final table."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for label, value in summary.table():
        table.add_row(label, value)
    console.print(table)


def _assemble(plan: DemoPlan, console: Console, stack: ExitStack) -> DemoParts:
    """Start all processes at once; ``stack`` ends them, Redis last."""
    from lambdapo_async.cli.run_watch import BrokerWatch, demo_redis  # redis only when something really starts

    url = stack.enter_context(demo_redis(os.environ, plan.folder / "redis"))
    watch = BrokerWatch(url, plan.run_id)
    watch.check_reachable()
    environ = {**os.environ, REDIS_URL_VARIABLE: url}
    supervisor = stack.enter_context(Supervisor(environ))
    learner = supervisor.start("the learner", plan.learner_command, log=plan.logs / "learner.log")
    make_pool = ProcessPool if plan.is_gpu else NurseryPool
    pool: ActorPool = make_pool(supervisor, plan.actor_arguments, logs=plan.logs)
    return DemoParts(
        metrics=metrics_path(plan.folder),
        num_actors=plan.num_actors,
        learner=learner,
        pool=pool,
        watch=watch,
        view=stack.enter_context(open_view(console)),
    )


def _progress(plan: DemoPlan) -> Progress:
    return Progress(num_steps=plan.config.learner.num_steps, target=plan.target)
