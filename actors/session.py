"""Puts an actor together from nothing but a Redis URL and a run id, and runs it."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from actors.actor import Actor
from actors.between_groups import updating_as
from actors.canary import ActorCanary, ScoringEngine
from actors.engine import CUT_OFF_S, InferenceEngine
from actors.follower import WeightFollower
from actors.handoff import Handoff
from actors.outbox import Outbox
from actors.parts import ActorParts
from actors.prompts import LeasedPrompts
from actors.publication import PUBLICATION_S, published_config, published_model_files
from actors.scoring import Scorer
from actors.scratch import scratch_folder
from actors.spool import Spool, spool_root
from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.config import RunConfig
from lambdapo_async.config.load import HMAC_KEY_VARIABLE, parse_published
from lambdapo_async.errors import BrokerError, ConfigError
from lambdapo_async.tasks.prompts import PromptEncoder
from lambdapo_async.tasks.registry import build_task
from lambdapo_async.weights.canary import ModelIdentity
from lambdapo_async.weights.canary_store import CanaryStore

logger = logging.getLogger(__name__)

_JOIN_TIMEOUT_S = 30.0
_MAX_MODEL_FILES_BYTES = 256 * 1024**2  # the largest tokenizers have some 40 MB


def read_run(
    url: str, run_id: str, overrides: Sequence[str], *, publication_s: float = PUBLICATION_S
) -> tuple[RedisRun, RunConfig]:
    """Connect and read the run's config, with this actor's own ``actor.*`` settings on top.

    Args:
        url, run_id, overrides: as on the command line.
        publication_s: deadline for the run's learner to publish it.

    Raises:
        BrokerUnreachableError: no Redis there.
        RunNotFoundError: no such run there at the deadline; one of a schema we do not know.
        ConfigError: an override of something that is not the actor's to choose, or LAMBDAPO_HMAC_KEY is not the run's.
        TaskError: a reward function that this machine does not have.
    """
    foreign = [override for override in overrides if not override.startswith("actor.")]
    if foreign:
        key = foreign[0].partition("=")[0] if "=" in foreign[0] else "***"  # the value may be a password
        raise ConfigError(f"--set {key}: an actor takes everything but actor.* from its run")
    run = RedisRun(url, run_id, timeout_s=_JOIN_TIMEOUT_S, hmac_key=os.environ.get(HMAC_KEY_VARIABLE))
    run.check_reachable()
    config_json = published_config(run, timeout_s=publication_s)
    config = parse_published(config_json, overrides, run_id=run_id)
    run.wait_at_most(config.broker.outage_s)
    build_task(config)  # finds missing rewards before an engine is started for them
    return run, config


def join_run(run: RedisRun, config: RunConfig, *, run_id: str, actor_id: str) -> None:
    """Sample for the run until it ends or SIGTERM asks us to drain."""
    parent = Path(tempfile.gettempdir()) if config.actor.mirror == "disk" else None
    with scratch_folder(parent) as scratch:
        asyncio.run(_join_run(run, config, run_id=run_id, actor_id=actor_id, scratch=scratch))


async def _join_run(run: RedisRun, config: RunConfig, *, run_id: str, actor_id: str, scratch: Path) -> None:
    exit_on_signals()  # again: the event loop has put in its own handler of Ctrl-C
    from actors.vllm_engine import VllmEngine  # seconds of imports, and a platform choice

    model_folder = write_model_files(run, scratch)
    with contextlib.closing(Scorer(config)) as scorer:
        engine = await VllmEngine.start(model_folder, config=config, scratch=scratch)
        try:
            sampler = updating_as(config.actor, engine)
            actor = Actor(_assemble(run, config, run_id, actor_id, engine=sampler, scorer=scorer, scratch=scratch))
            _drain_on_signals(actor)
            logger.info("actor %s samples for run %s", actor_id, run_id)
            await actor.run()
        finally:
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
    follower = WeightFollower(run.weights, engine, run_id=run_id, folder=scratch, config=config)
    outbox, orphans = _outboxes(run, config, run_id, actor_id)
    return ActorParts(
        actor_id=actor_id,
        config=config,
        engine=engine,
        follower=follower,
        canary=_canary(run.canary, engine, config, model_folder=scratch / "model", checksum_of=follower.checksum_of),
        prompts=LeasedPrompts(run.run_store, encoder, tokenizer, config),
        scorer=scorer,
        handoff=Handoff(
            run.partials(actor_id),
            run.seal,
            config,
            actor_id=actor_id,
            vocab_size=_vocab_size(scratch / "model"),
            newest_version=lambda: run.run_store.state().version,
        ),
        outbox=outbox,
        orphans=orphans,
        admission=run.admission(actor_id),
        fleet=run.fleet,
        run_store=run.run_store,
        hurry=lambda: run.wait_at_most(max(config.actor.drain_s, CUT_OFF_S)),
    )


def _canary(
    store: CanaryStore,
    engine: ScoringEngine,
    config: RunConfig,
    *,
    model_folder: Path,
    checksum_of: Callable[[int], str | None],
) -> ActorCanary:
    return ActorCanary(
        store,
        engine,
        ModelIdentity.of({file.name: file.read_bytes() for file in model_folder.iterdir()}),
        checksum_of=checksum_of,
        every_s=60 * config.actor.canary_minutes,
        timeout_s=config.learner.data_timeout_s,
    )


def _vocab_size(model_folder: Path) -> int:
    """Token ids that the model knows: an engine fails on any other."""
    from transformers import AutoConfig

    num_tokens: int = AutoConfig.from_pretrained(model_folder).get_text_config().vocab_size
    return num_tokens


def _outboxes(run: RedisRun, config: RunConfig, run_id: str, actor_id: str) -> tuple[Outbox, tuple[Outbox, ...]]:
    """Our own, and those of dead actors of this run on this machine."""
    sink, root, epoch = run.sink(), spool_root(config.actor.spool_dir, run_id), run.run_store.state().epoch
    outage_s = config.broker.outage_s
    orphans = [Outbox.adopted(sink, spool, epoch=epoch, outage_s=outage_s) for spool in Spool.adopt(root)]
    own = Outbox(sink, Spool.create(root, f"{actor_id}.0"), epoch=epoch, outage_s=outage_s)
    return own, tuple(orphans)


def write_model_files(run: RedisRun, scratch: Path) -> Path:
    """Config, tokenizer and what else the run's model comes with, but no weights; returns their folder.

    Raises:
        RunNotPublishedError: Redis lost them, and the run's learner did not publish them again in time.
        BrokerError: not what a learner publishes.
    """
    files = published_model_files(run)
    _check_model_files(files)
    folder = scratch / "model"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def _check_model_files(files: Mapping[str, bytes]) -> None:
    """Whoever may write to Redis must not write anywhere on this machine, nor fill its memory."""
    for name in files:
        if not name or Path(name).name != name or name.startswith(".") or not name.isprintable():
            raise BrokerError(f"the run has a model file {name!r:.200}, which is no plain file name: do not trust it")
    num_bytes = sum(len(content) for content in files.values())
    if num_bytes > _MAX_MODEL_FILES_BYTES:
        raise BrokerError(
            f"the run's model files have {num_bytes} bytes, more than {_MAX_MODEL_FILES_BYTES}: "
            "publish config and tokenizer alone"
        )


def exit_on_signals() -> None:
    """Until the actor can drain, SIGTERM (status 0) and Ctrl-C end it at once, by way of every ``finally``.

    Not by the event loop, which the engine's start blocks, and whose handlers a forked engine would share with us.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _drain_on_signals(actor: Actor) -> None:
    """The first SIGTERM or Ctrl-C drains; the next one has its usual effect."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _drain_once, actor, loop, number)


def _drain_once(actor: Actor, loop: asyncio.AbstractEventLoop, number: signal.Signals) -> None:
    logger.info("%s: draining", number.name)
    loop.remove_signal_handler(number)
    actor.drain()
