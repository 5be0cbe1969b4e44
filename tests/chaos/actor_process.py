"""An actor under faults: the product's own ``python -m actors``, with an engine and a scorer without a model."""

import os
import sys
import types
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

import actors.session as session
from actors.handoff import Handoff
from actors.mirror import Mirror
from actors.sampled import Sampled
from actors.scripted_engine import ScriptedEngine
from actors.spool import Spool
from lambdapo_async.broker.admission import RedisAdmission
from lambdapo_async.broker.fleet import RedisFleet
from lambdapo_async.broker.rollout_sink import RedisRolloutSink
from lambdapo_async.config import RunConfig
from lambdapo_async.tasks.interface import Row, Scored
from tests.chaos.counting_policy import logit_table, name_of_weights
from tests.chaos.fault_points import ACTOR_POINTS, FaultPoints
from tests.chaos.learner_process import become
from tests.chaos.ledger import Ledger
from tests.chaos.mutants import install
from tests.chaos.spec import RUN_ID, ProcessSpec

EOS = 1


def run_actor_process(spec: ProcessSpec, parent_pid: int) -> None:
    """Target of a forked process; never returns."""
    become(spec, parent_pid)
    ledger = Ledger(spec.folder, spec.who)
    ledger.write("started", pid=os.getpid())
    install(spec.mutant)
    points = FaultPoints(spec.folder, spec.who, ledger)
    _replace_engine(spec, ledger)
    _tap(points, ledger)
    from actors.__main__ import main

    main(["--run-id", RUN_ID, "--redis-url", spec.url])


class LedgerEngine(ScriptedEngine):
    """Says what it adopted before it samples under it."""

    def __init__(self, ledger: Ledger, *, max_length: int) -> None:
        table = logit_table()
        # The same table under every version: what is tested is delivery, and the canary stays exact.
        super().__init__(lambda _, tokens: table[tokens[-1]], eos_token_id=EOS, max_length=max_length, seed=os.getpid())
        self._ledger = ledger

    async def load_weights(self, version: int, path: Path, *, changed: Set[str] | None = None) -> float:
        self._ledger.write("adopted", version=version, weights=name_of_weights(load_file(path)["digest"]))
        return await super().load_weights(version, path, changed=changed)


class IndexScorer:
    """Every seventh row has no signal; the others have one."""

    def __init__(self, config: RunConfig, *_: object) -> None:
        self.failures = 0

    async def score(self, row: Row, completions: Sequence[str]) -> list[Scored]:
        is_flat = sum(map(ord, row.prompt)) % 7 == 0
        rewards = [float(number % 2 and not is_flat) for number in range(len(completions))]
        return [Scored(reward, {"verifiable": reward}) for reward in rewards]

    def close(self) -> None: ...


def _replace_engine(spec: ProcessSpec, ledger: Ledger) -> None:
    class VllmEngine:
        @staticmethod
        async def start(model_folder: Path, *, config: RunConfig, **_: object) -> ScriptedEngine:
            return LedgerEngine(ledger, max_length=config.model.max_length)

    module: Any = types.ModuleType("actors.vllm_engine")
    module.VllmEngine = VllmEngine
    sys.modules["actors.vllm_engine"] = module
    session.Scorer = IndexScorer  # type: ignore[assignment, misc]


def _tap(points: FaultPoints, ledger: Ledger) -> None:
    def leased(leases: Any, *_: object) -> None:
        for lease in leases:
            if lease.split == "train":
                ledger.write("leased", index=lease.index)

    def offered(reply: Any, _: Any, deliveries: Any, **__: object) -> None:
        for descriptor in (each.descriptor for each in deliveries):
            status = "OK" if descriptor.seq <= reply.last else str(reply.status)
            ledger.write(
                "offered", status=status, producer=descriptor.producer, seq=descriptor.seq,
                index=descriptor.lease.index if descriptor.lease.split == "train" else None,
            )  # fmt: skip

    points.tap(RedisAdmission, "lease", "lease", after=leased)
    points.tap(RedisAdmission, "renew", "renew")
    points.tap(RedisAdmission, "hand_back", "hand_back")
    points.tap(RedisRolloutSink, "enqueue", "enqueue", after=offered)
    points.tap(RedisFleet, "beat", "beat")
    points.tap(Sampled, "rewarded", "sampled")
    points.tap(Handoff, "leave", "leave")
    points.tap(Handoff, "take", "take")
    points.tap(Mirror, "advance", "advance")
    points.tap(Spool, "write", "spool")
    points.tap(Spool, "delete", "spool_delete")
    points.tap(Spool, "adopt", "adopt")
    points.tap(os, "fsync", "fsync")
    points.tap_scripts()
    points.check(ACTOR_POINTS)
