"""The protocol broken on purpose, one promise at a time, to see that the ledger notices.

A mutant replaces a call or a line of Lua in the forked process that it is for; product code knows nothing of it.
"""

import hashlib
import inspect
import re
import textwrap
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any, cast

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

import learner.assembly as assembly
from lambdapo_async.broker import script as script_module
from lambdapo_async.broker.client import Broker
from lambdapo_async.broker.interface import Delivery
from lambdapo_async.broker.rollout_source import RedisRolloutSource
from lambdapo_async.broker.script import Script
from lambdapo_async.journal.history import History
from lambdapo_async.journal.journal import Journal
from lambdapo_async.journal.receipts import Receipts
from lambdapo_async.journal.redo import redo
from lambdapo_async.replay.queue import ReplayQueue
from learner.arrivals import Arrival
from learner.checkpoint import Checkpoint, CheckpointStore
from learner.learner import Learner
from learner.pool import Pool
from learner.versions import VersionCounter
from tests.chaos.proof import Kind
from tests.chaos.spec import VARIANTS, Variant

_PATIENCE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One broken promise and how to provoke it."""

    promise: str
    """What is broken, in words."""
    caught: tuple[Kind, ...]
    """Violations of which at least one must show."""
    faults: tuple[str, ...]
    """Keys of ``faults.FAULTS``, in order."""
    profile: str = "stable"
    variant: Variant = VARIANTS[0]
    num_steps: int | None = None
    """Where the run ends by itself; None lets the last fault decide."""
    install: Callable[[], None] = lambda: None
    """In every process, before it begins."""
    scripts: Mapping[str, str] = field(default_factory=dict)
    """Script -> regular expression of what is cut out of it."""


def install(name: str) -> None:
    """Break this process as the mutant ``name`` says; nothing for the empty one."""
    if name:
        mutant = MUTANTS[name]
        mutant.install()
        _edit_scripts(mutant.scripts)


def _edit_scripts(edits: Mapping[str, str]) -> None:
    initialise = Script.__init__

    def edited(script: Any, broker: Broker, name: str, **kind: Any) -> None:
        initialise(script, broker, name, **kind)
        if name in edits:
            source, count = re.subn(edits[name], "", script._source, flags=re.DOTALL)
            assert count > 0, f"{name}.lua has nothing like {edits[name]!r}"
            script._source, script._hash = source, hashlib.sha1(source.encode()).hexdigest()

    Script.__init__ = edited  # type: ignore[method-assign]


def _cut(function: Callable[..., object], pattern: str) -> None:
    """Take what matches out of a product function, wherever it was imported to."""
    target = cast(FunctionType, function)
    source, count = re.subn(pattern, "pass\n", textwrap.dedent(inspect.getsource(target)), flags=re.DOTALL)
    assert count == 1, f"{target.__qualname__} has not one of {pattern!r}"
    scope: dict[str, Any] = {}
    exec(source, target.__globals__, scope)
    target.__code__ = scope[target.__name__].__code__


def _forget_numbers() -> None:
    """The learner looks at them, too: behind both of its looks nothing of a repeated offer would show."""
    _cut(RedisRolloutSource.read, r"if seq != .*?raise LostDataError\([^\n]*\n")
    Receipts.is_known = lambda self, descriptor: False  # type: ignore[method-assign]
    Receipts._is_received = lambda self, index: False  # type: ignore[method-assign]


def _commit_before_the_journal() -> None:
    read = RedisRolloutSource.read

    def greedy(self: RedisRolloutSource, max_groups: int, *, timeout_s: float) -> list[Delivery]:
        deliveries = read(self, max_groups, timeout_s=timeout_s)
        marks: dict[str, int] = {}
        for delivery in deliveries:
            marks[delivery.descriptor.producer] = delivery.descriptor.seq
        if marks:
            self.commit(marks)
        return deliveries

    RedisRolloutSource.read = greedy  # type: ignore[method-assign]


def _fence_after_loading() -> None:
    """Waits between the two until the learner before has made another checkpoint: the race, made certain."""
    take_fence, load_latest, find = CheckpointStore.take_fence, CheckpointStore.load_latest, History.find
    loaded: list[Checkpoint | None] = []
    found: dict[Path, History] = {}

    def late(self: CheckpointStore) -> int:
        if any(self._folder.glob("step-*")):
            journal = self._folder.parent / "journal"
            found[journal] = find(journal)
            loaded.append(load_latest(self, found[journal]))
            deadline = time.monotonic() + _PATIENCE_S
            while _newest(self) == _folder(loaded[0]) and time.monotonic() < deadline:
                time.sleep(0.005)
        return take_fence(self)

    def early(self: CheckpointStore, history: History | None = None) -> Checkpoint | None:
        return loaded[0] if loaded else load_latest(self, history)

    # What notices that the journal went on meanwhile goes, too.
    _cut(redo, r"if record\.step != .*?raise [^\n]*\n")
    _cut(History.read, r"if first < .*?\n        \)\n")
    _cut(ReplayQueue.offer, r"if entry\.number <= .*?raise [^\n]*\n")
    CheckpointStore.take_fence, CheckpointStore.load_latest = late, early  # type: ignore[method-assign]
    History.find = classmethod(lambda _, folder: found.get(folder) or find(folder))  # type: ignore[method-assign, assignment]


def _newest(store: CheckpointStore) -> Path | None:
    return next(iter(store._newest_first()), None)


def _folder(checkpoint: Checkpoint | None) -> Path | None:
    return None if checkpoint is None else checkpoint.folder


def _reuse_versions() -> None:
    initialise = VersionCounter.__init__

    def forgetful(self: VersionCounter, journal: Journal, newest: int) -> None:
        initialise(self, journal, max(-1, newest - 2))

    VersionCounter.__init__ = forgetful  # type: ignore[method-assign]


def _number_from_the_journal_alone() -> None:
    """A learner that is to stop waits until all that it holds came after its last version: the case, made certain."""
    survey, initialise, claim = assembly.survey, VersionCounter.__init__, VersionCounter.claim
    stop, offer = Learner.stop, Pool.offer
    journaled, claimed_before = [-1], [0]
    stopped: list[Learner] = []

    def surveyed(records: Any, receipts: Any) -> int:
        journaled[0] = survey(records, receipts)
        return journaled[0]

    def claimed(self: VersionCounter) -> int:
        version = claim(self)
        claimed_before[0] = self._journal.next_number
        return version

    def offered(self: Pool, arrival: Arrival) -> bool:
        was_taken = offer(self, arrival)
        if stopped and was_taken and not self.can_sample() and self.state().keep_from >= claimed_before[0]:
            stop(stopped[0])
        return was_taken

    assembly.survey = surveyed
    VersionCounter.__init__ = lambda self, journal, newest: initialise(self, journal, journaled[0])  # type: ignore[method-assign]
    VersionCounter.claim = claimed  # type: ignore[method-assign]
    Learner.stop = lambda self: stopped.append(self)  # type: ignore[method-assign]
    Pool.offer = offered  # type: ignore[method-assign]


def _retry_round_trips() -> None:
    """redis-py's retries, around our own round trips, which they would not reach otherwise."""
    once = script_module.round_trip

    def retried(client: redis.Redis, *commands: Any) -> list[Any]:
        replies: list[Any] = Retry(NoBackoff(), 10).call_with_retry(lambda: once(client, *commands), lambda _: None)
        return replies

    script_module.round_trip = retried


def retry_inside_redis_py(client: redis.Redis) -> None:
    """The library's own default, which we turn off."""
    retry = Retry(NoBackoff(), 10)
    client.connection_pool.connection_kwargs["retry"] = retry
    client.set_retry(retry)


MUTANTS = {
    "commit_before_the_journal": Mutant(
        promise="Redis and the actor forget a group only when it is durable at the learner",
        caught=("lost",),
        faults=("learner_dies_before_the_journal",) * 3,
        install=_commit_before_the_journal,
    ),
    "no_sequence_check": Mutant(
        promise="a repeated offer is recognised by its number",
        caught=("lost", "twice", "skipped", "miscounted"),
        profile="cut",
        faults=("lose_offer_reply",) * 12,
        install=_forget_numbers,
        # The memory of answered leases is cut out, too: it is a second net, behind which nothing of this one shows.
        scripts={
            "enqueue": r"if seq <= last then .*? end\n|if seq ~= last \+ 1 then .*? end\n"
            r"| or redis\.call\('ZSCORE', KEYS\[9\], lease\)"
        },
    ),
    "fence_after_loading": Mutant(
        promise="what a learner loads cannot be added to by the one before",
        caught=("lost", "twice", "skipped", "rewritten"),
        faults=("replace_running_learner",) * 3,
        install=_fence_after_loading,
    ),
    "version_reused": Mutant(
        promise="a number names one set of weights for ever",
        caught=("version_reused",),
        faults=("kill_learner",) * 3,
        install=_reuse_versions,
        scripts={
            "weights_begin": r"if head and tonumber\(head\) >= tonumber\(ARGV\[2\]\) then return .*? end",
            "weights_flip": r"if head and tonumber\(head\) > tonumber\(ARGV\[2\]\) then return .*? end",
        },
    ),
    "versions_from_the_journal_alone": Mutant(
        promise="a version that only the checkpoint knows of is not given away again",
        caught=("version_reused",),
        profile="empty",
        faults=("lose_a_suspended_run",) * 3,
        install=_number_from_the_journal_alone,
    ),
    "lease_forgotten": Mutant(
        promise="a dead actor's leases go to somebody else",
        caught=("skipped",),
        faults=("kill_actor",) * 6,
        num_steps=120,
        scripts={"lease": r"put_in_front\([^\n]*expired\[i\]\)"},
    ),
    "payloads_kept": Mutant(
        promise="a server holds no more than the run's budget, whatever its counter says",
        caught=("over_budget",),
        faults=("kill_actor",) * 2,
        variant=Variant(max_tokens=600),
        num_steps=170,
        scripts={"commit": r"redis\.call\('UNLINK'[^\n]*"},
    ),
    "retries_inside_the_client": Mutant(
        promise="each call is repeated by our loop alone, which has the deadline",
        caught=("retried",),
        profile="cut",
        faults=("lose_offer_reply",) * 12,
        install=_retry_round_trips,
    ),
}
