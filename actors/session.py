"""Puts an actor together from nothing but a Redis URL and a run id, and runs it."""

import asyncio
import contextlib
import json
import logging
import shutil
import signal
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from actors.actor import Actor, ActorParts
from actors.engine import InferenceEngine
from actors.follower import WeightFollower
from actors.outbox import Outbox
from actors.prompts import LeasedPrompts
from actors.scoring import Scorer
from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.config import RunConfig
from lambdapo_async.config.load import apply_overrides, parse_config
from lambdapo_async.errors import ConfigError
from lambdapo_async.tasks.prompts import PromptEncoder
from lambdapo_async.tasks.registry import build_task

logger = logging.getLogger(__name__)

_JOIN_TIMEOUT_S = 30.0


def read_run(url: str, run_id: str, overrides: Sequence[str]) -> tuple[RedisRun, RunConfig]:
    """Connect and read the run's config, with this actor's own ``actor.*`` settings on top.

    Raises:
        RunNotFoundError: no such run there, or one of a schema we do not know.
        ConfigError: an override of something that is not the actor's to choose.
    """
    foreign = [override for override in overrides if not override.startswith("actor.")]
    if foreign:
        raise ConfigError(f"--set {foreign[0]}: an actor takes everything but actor.* from its run")
    run = RedisRun(url, run_id, timeout_s=_JOIN_TIMEOUT_S)
    tree = json.loads(run.run_store.config_json())
    return run, parse_config(apply_overrides(tree, overrides), source=f"run {run_id}")


def join_run(run: RedisRun, config: RunConfig, *, run_id: str, actor_id: str) -> None:
    """Sample for the run until it ends or SIGTERM asks us to drain."""
    with _scratch_folder() as scratch:
        asyncio.run(_join_run(run, config, run_id=run_id, actor_id=actor_id, scratch=scratch))


async def _join_run(run: RedisRun, config: RunConfig, *, run_id: str, actor_id: str, scratch: Path) -> None:
    from actors.vllm_engine import VllmEngine  # seconds of imports, and a platform choice

    model_folder = _write_model_files(run, scratch)
    scorer = Scorer(config)
    engine = await VllmEngine.start(model_folder, config=config, scratch=scratch)
    try:
        actor = Actor(_assemble(run, config, run_id, actor_id, engine=engine, scorer=scorer, scratch=scratch))
        _drain_on_signals(actor)
        logger.info("actor %s samples for run %s", actor_id, run_id)
        await actor.run()
    finally:
        scorer.close()
        await engine.shutdown()


def _assemble(
    run: RedisRun,
    config: RunConfig,
    run_id: str,
    actor_id: str,
    *,
    engine: InferenceEngine,
    scorer: Scorer,
    scratch: Path,
) -> ActorParts:
    from transformers import AutoTokenizer  # seconds of imports

    tokenizer = AutoTokenizer.from_pretrained(scratch / "model")
    encoder = PromptEncoder(tokenizer, build_task(config), config)
    return ActorParts(
        actor_id=actor_id,
        config=config,
        engine=engine,
        follower=WeightFollower(run.weights, engine, run_id=run_id, folder=scratch),
        prompts=LeasedPrompts(run.run_store, encoder, tokenizer, config),
        scorer=scorer,
        outbox=Outbox(
            run.sink(),
            producer=actor_id,
            epoch=run.run_store.state().epoch,
            full_timeout_s=config.learner.data_timeout_s,
        ),
        admission=run.admission(actor_id),
        fleet=run.fleet,
        run_store=run.run_store,
    )


def _write_model_files(run: RedisRun, scratch: Path) -> Path:
    folder = scratch / "model"
    folder.mkdir()
    for name, content in run.run_store.model_files().items():
        (folder / name).write_bytes(content)
    return folder


@contextlib.contextmanager
def _scratch_folder() -> Iterator[Path]:
    """A folder in memory where there is one: every weight version passes through it."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="lambdapo-actor-", dir=memory if memory.is_dir() else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _drain_on_signals(actor: Actor) -> None:
    """The first SIGTERM or Ctrl-C drains; the next one has its usual effect."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _drain_once, actor, loop, number)


def _drain_once(actor: Actor, loop: asyncio.AbstractEventLoop, number: signal.Signals) -> None:
    logger.info("%s: draining", number.name)
    loop.remove_signal_handler(number)
    actor.drain()
