"""Journal and checkpoint lead to the batches that were made before, wherever a learner dies."""

import contextlib
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lambdapo_async.broker.interface import Descriptor
from lambdapo_async.journal.journal import Journal
from lambdapo_async.journal.receipts import Receipts, ReceiptsState
from lambdapo_async.journal.records import GroupRecord, StepRecord
from lambdapo_async.journal.redo import redo, survey
from lambdapo_async.replay.bias import GroupShape
from lambdapo_async.replay.limits import ReplayLimits
from lambdapo_async.replay.queue import ReplayEntry, ReplayQueue, ReplaySnapshot
from lambdapo_async.rollout import Lease
from tests.replay_entries import FOREVER, any_limits, make_limits, numbers


class Killed(Exception):  # noqa: N818 - the end of a process, not an error
    """The learner died here."""


@dataclass
class World:
    """What outlives a learner: its disk, and a Redis that offers every group until it is committed."""

    folder: Path
    arrivals: Sequence[GroupRecord]
    arrived_before: Sequence[int]
    """[steps] groups that have reached Redis when a step waits for its batch."""
    limits: ReplayLimits
    checkpoint_every: int
    lives: Iterator[int]
    """Operations after which each life ends."""
    committed: int = 0
    checkpoint: tuple[int, int, int, str, dict[str, int]] = (0, 0, 0, ReplaySnapshot().model_dump_json(), {})
    """step, version, taken, replay queue, watermarks"""
    kept_from: int = 1
    fence: int = 0
    trained: dict[int, list[tuple[int, ...]]] = field(default_factory=dict)
    """step -> what each life that came so far trained on."""


class SimulatedLearner:
    """One life, as the real loop lives it: journal, commit, offer, choose, write the step, train, checkpoint."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._left = next(world.lives)
        world.fence += 1
        self._journal = Journal.open(world.folder, world.fence, segment_bytes=400)
        self._step, self._version, self._taken, snapshot, watermarks = world.checkpoint
        state = ReplaySnapshot.model_validate_json(snapshot)
        history = self._journal.history
        members = [
            _entry(number, record)
            for number, record in history.read(world.kept_from)
            if isinstance(record, GroupRecord) and number in state.uses
        ]
        self._queue = ReplayQueue(world.limits, state, members)
        receipts = Receipts(ReceiptsState(watermarks=watermarks))
        survey(history.read(world.kept_from), receipts)
        self._marks = receipts.state().watermarks
        self._waiting: list[tuple[int, GroupRecord]] = []

    def live(self) -> None:
        with contextlib.closing(self._journal):
            for part in redo(self._journal.history.read(self._taken + 1), taken=self._taken, step=self._step):
                self._waiting += part.arrivals
                if part.step is not None:
                    self._redo(part.step)
            while self._step < len(self._world.arrived_before):
                self._do()

    def _redo(self, step: StepRecord) -> None:
        self._queue.advance(step.version)
        while self._waiting:
            assert self._offer_next()
        self._train(step, self._queue.take(step.chosen) if step.chosen else [])

    def _do(self) -> None:
        self._queue.advance(self._version)
        self._receive()
        while self._waiting and self._offer_next():
            pass
        # A world with no more to give lets the step train nothing; the real learner would wait.
        batch = self._queue.sample() if self._queue.can_sample() else []
        drops = tuple((drop.number, drop.reason) for drop in self._queue.take_drops())
        step = StepRecord(self._step + 1, self._version, self._taken, tuple(numbers(batch)), drops)
        self._append([step])
        self._train(step, batch, drops=drops)

    def _receive(self) -> None:
        """Read what Redis holds, in batches; journal; commit."""
        while (first := self._marks.get("a", 0)) < self._world.arrived_before[self._step]:
            read = self._world.arrivals[first : min(first + 3, self._world.arrived_before[self._step])]
            assert first >= self._world.committed, "Redis forgot a group that is not in the journal"
            got = self._append(read)
            self._waiting += zip(got, read, strict=True)
            self._marks["a"] = first + len(read)
            self._may_die(self._commit)

    def _commit(self) -> None:
        self._world.committed = self._marks["a"]

    def _offer_next(self) -> bool:
        number, record = self._waiting[0]
        if not record.discarded and not self._queue.offer(_entry(number, record)):
            return False
        self._waiting.pop(0)
        self._taken = number
        return True

    def _train(
        self,
        step: StepRecord,
        batch: Sequence[ReplayEntry[str]],
        *,
        drops: tuple[tuple[int, str], ...] | None = None,
    ) -> None:
        if drops is None:
            drops = tuple((drop.number, drop.reason) for drop in self._queue.take_drops())
        assert drops == step.dropped
        self._world.trained.setdefault(step.step, []).append(tuple(numbers(batch)))
        self._step, self._version = step.step, step.version + 1
        if self._step % self._world.checkpoint_every == 0:
            self._may_die(self._save)

    def _save(self) -> None:
        world = self._world
        keep_from = min(self._queue.oldest_number(), self._taken + 1)
        world.checkpoint = (
            self._step, self._version, self._taken, self._queue.snapshot().model_dump_json(), dict(self._marks)
        )  # fmt: skip
        world.kept_from = keep_from
        self._journal.prune(keep_from)

    def _append(self, records: Sequence[GroupRecord | StepRecord]) -> range:
        """Die in the middle of the write, which leaves a torn tail, or after it."""
        files = set(self._world.folder.iterdir())
        sizes = {path: path.stat().st_size for path in files}
        got = self._journal.append(records)
        self._left -= 1
        if self._left == 0:
            for path in self._world.folder.iterdir():
                before, after = sizes.get(path, 0), path.stat().st_size
                os.truncate(path, before + (after - before) // 2)
            raise Killed
        self._die_if_due()
        return got

    def _may_die(self, operation: Callable[[], None]) -> None:
        """Die before or after it: each operation is two places."""
        self._die_if_due()
        operation()
        self._die_if_due()

    def _die_if_due(self) -> None:
        self._left -= 1
        if self._left == 0:
            raise Killed


def _entry(number: int, record: GroupRecord) -> ReplayEntry[str]:
    of = record.descriptor
    return ReplayEntry(
        number=number,
        min_version=of.min_version,
        num_bytes=of.num_bytes,
        mass=of.mean_reward,
        shape=GroupShape(of.num_bytes, 0.5),
        item=f"{of.producer} {of.seq}",
    )


def _run(world: World) -> tuple[list[tuple[int, ...]], int]:
    """The last word on each step, and the number of lives."""
    for life in itertools.count(1):
        try:
            SimulatedLearner(world).live()
        except Killed:
            continue
        return [batches[-1] for _, batches in sorted(world.trained.items())], life
    raise AssertionError


@st.composite
def worlds(draw: st.DrawFn) -> dict[str, object]:
    num_steps = draw(st.integers(1, 8))
    arrived = list(itertools.accumulate(draw(st.lists(st.integers(0, 6), min_size=num_steps, max_size=num_steps))))
    groups = [
        GroupRecord(
            Descriptor(
                "a",
                seq,
                Lease("train", seq),
                draw(st.integers(0, 4)),
                draw(st.integers(1, 10)),
                draw(st.sampled_from([0.0, 0.25, 1.0])),
            ),
            b"x" * draw(st.integers(0, 60)),
            draw(st.sampled_from(["", "", "", "zero_variance"])),
        )
        for seq in range(1, arrived[-1] + 1)
    ]
    return {
        "arrivals": groups,
        "arrived_before": arrived,
        "limits": draw(any_limits()),
        "checkpoint_every": draw(st.integers(1, 4)),
    }


@settings(max_examples=30, deadline=None)
@given(worlds(), st.lists(st.integers(1, 25), max_size=6))
def test_a_learner_killed_anywhere_trains_as_if_it_had_lived(
    tmp_path_factory: pytest.TempPathFactory, parts: dict[str, object], deaths: list[int]
) -> None:
    alive = World(tmp_path_factory.mktemp("alive"), lives=itertools.repeat(FOREVER), **parts)  # type: ignore[arg-type]
    expected, _ = _run(alive)
    mortal = World(
        tmp_path_factory.mktemp("mortal"),
        lives=itertools.chain(deaths, itertools.repeat(FOREVER)),
        **parts,  # type: ignore[arg-type]
    )
    batches, _ = _run(mortal)
    assert batches == expected
    assert mortal.checkpoint[3] == alive.checkpoint[3]


def test_every_single_place_to_die(tmp_path: Path) -> None:
    """One run, killed once at each of its operations in turn; each step is the same in every life, too."""
    arrivals = [
        GroupRecord(Descriptor("a", seq, Lease("train", seq), seq // 5, 3, 0.5 + seq % 3), b"p" * 30)
        for seq in range(1, 21)
    ]
    parts = {
        "arrivals": arrivals,
        "arrived_before": [4, 8, 8, 14, 20],
        "limits": make_limits(
            groups=3, min_size=4, ratio=1.5, buffer=4.0, max_uses=3, max_groups=8, drop_above=3, half_life=2.0
        ),
        "checkpoint_every": 2,
    }
    expected, _ = _run(World(tmp_path / "alive", lives=itertools.repeat(FOREVER), **parts))  # type: ignore[arg-type]
    assert max(Counter(itertools.chain(*expected)).values()) > 1
    assert all(len(batch) == 3 for batch in expected)
    lives = 2
    death = 0
    while lives == 2:
        death += 1
        world = World(
            tmp_path / f"death-{death}",
            lives=itertools.chain([death], itertools.repeat(FOREVER)),
            **parts,  # type: ignore[arg-type]
        )
        batches, lives = _run(world)
        assert batches == expected
        assert all(len(set(each)) == 1 for each in world.trained.values())
    assert death > 30
