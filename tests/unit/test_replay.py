"""The replay queue, and that a learner killed anywhere trains on the same batches as one that lived."""

import contextlib
import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lambdapo_async.broker.interface import Descriptor
from lambdapo_async.journal.journal import Journal
from lambdapo_async.journal.receipts import Receipts, ReceiptsState
from lambdapo_async.journal.records import GroupRecord, StepRecord
from lambdapo_async.journal.redo import redo, survey
from lambdapo_async.replay.bias import BiasMeter, BiasState, GroupShape
from lambdapo_async.replay.limits import ReplayError, ReplayLimits
from lambdapo_async.replay.priority import log_weights, weighted_order
from lambdapo_async.replay.queue import Drop, ReplayEntry, ReplayQueue, ReplaySnapshot
from lambdapo_async.replay.rate_limiter import RateLimit
from lambdapo_async.rollout import Lease
from tests.reference.replay import order_probability

FOREVER = 10**9


def entry(
    number: int, *, version: int = 0, num_bytes: int = 1, mass: float = 1.0, length: int = 10
) -> ReplayEntry[str]:
    return ReplayEntry(
        number=number,
        min_version=version,
        num_bytes=num_bytes,
        mass=mass,
        shape=GroupShape(length, 0.5),
        item=f"group {number}",
    )


def make_limits(
    *,
    groups: int = 2,
    min_size: int | None = None,
    ratio: float | None = None,
    buffer: float = 0.0,
    max_uses: int = 1,
    max_groups: int = 100,
    max_bytes: int = 1000,
    drop_above: int = FOREVER,
    half_life: float = math.inf,
    seed: int = 0,
) -> ReplayLimits:
    return ReplayLimits(
        rate=RateLimit(
            groups_per_sample=groups, min_size=min_size or groups, samples_per_insert=ratio, error_buffer=buffer
        ),
        max_uses=max_uses,
        max_groups=max_groups,
        max_bytes=max_bytes,
        drop_above=drop_above,
        half_life=half_life,
        seed=seed,
    )


def numbers(entries: Iterable[ReplayEntry[str]]) -> list[int]:
    return [entry.number for entry in entries]


# A plain stream


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.lists(st.floats(0.0, 10.0), max_size=30), st.integers(0, 3))
def test_one_use_is_a_plain_stream_in_order_of_arrival(groups: int, masses: list[float], seed: int) -> None:
    queue = ReplayQueue[str](make_limits(groups=groups, half_life=1.0, seed=seed))
    batches = []
    for number, mass in enumerate(masses, 1):
        assert queue.offer(entry(number, version=number % 3, mass=mass))
        if queue.can_sample():
            batches.append(numbers(queue.sample()))
    arrivals = range(1, len(masses) + 1)
    assert batches == [list(arrivals[i : i + groups]) for i in range(0, len(masses) - groups + 1, groups)]
    assert queue.consumed == sum(map(len, batches))
    assert queue.num_groups == len(masses) % groups


def test_a_full_stream_makes_the_next_group_wait() -> None:
    queue = ReplayQueue[str](make_limits(groups=2, max_groups=3))
    assert [queue.offer(entry(number)) for number in (1, 2, 3, 4)] == [True, True, True, False]
    assert numbers(queue.sample()) == [1, 2]
    assert queue.offer(entry(4))
    assert numbers(queue.sample()) == [3, 4]
    assert queue.dropped == {"exhausted": 4}


# Bounds


def test_what_is_too_old_is_dropped_and_counted() -> None:
    queue = ReplayQueue[str](make_limits(drop_above=2))
    queue.advance(5)
    assert queue.offer(entry(1, version=2))
    assert queue.offer(entry(2, version=3))
    assert queue.offer(entry(3, version=4))
    assert queue.num_groups == 2
    queue.advance(6)
    assert not queue.can_sample()
    assert queue.missing_inserts() == 1
    shape = GroupShape(10, 0.5)
    assert queue.take_drops() == [Drop(1, "stale", 0, shape), Drop(2, "stale", 0, shape)]
    assert queue.take_drops() == []
    assert queue.consumed == 2
    with pytest.raises(ReplayError, match="version 5 follows 6"):
        queue.advance(5)


def test_a_group_that_can_never_fit_is_dropped() -> None:
    queue = ReplayQueue[str](make_limits(max_bytes=10))
    assert queue.offer(entry(1, num_bytes=11))
    assert (queue.dropped, queue.num_bytes, queue.consumed) == ({"too_large": 1}, 0, 1)


def test_the_most_used_then_the_oldest_make_room_and_unused_ones_never() -> None:
    queue = ReplayQueue[str](make_limits(groups=2, max_uses=5, max_groups=4))
    for number, version in ((1, 3), (2, 1), (3, 2), (4, 0)):
        assert queue.offer(entry(number, version=version))
    queue.take([1, 2])
    queue.take([2, 3])
    queue.take_drops()
    assert queue.offer(entry(5))
    assert queue.offer(entry(6))
    assert queue.offer(entry(7))
    assert [(drop.number, drop.reason, drop.uses) for drop in queue.take_drops()] == [
        (2, "evicted", 2), (3, "evicted", 1), (1, "evicted", 1),
    ]  # fmt: skip
    assert not queue.offer(entry(8))
    assert queue.can_sample()


def test_nothing_is_evicted_when_that_would_not_make_enough_room() -> None:
    queue = ReplayQueue[str](make_limits(groups=1, max_uses=3, max_bytes=10))
    assert queue.offer(entry(1, num_bytes=2))
    assert queue.offer(entry(2, num_bytes=7))
    queue.take([1])
    assert not queue.offer(entry(3, num_bytes=6))
    assert (queue.num_groups, queue.dropped) == (2, {})


def test_a_full_queue_overrules_the_ratio() -> None:
    """Bytes ran out before the ratio was reached: someone must go on."""
    queue = ReplayQueue[str](make_limits(groups=2, ratio=1.0, buffer=2.0, max_uses=3, max_bytes=12))
    for number in (1, 2):
        assert queue.offer(entry(number, num_bytes=2))
    assert numbers(sorted(queue.sample(), key=lambda taken: taken.number)) == [1, 2]
    assert not queue.can_sample()
    assert queue.offer(entry(3, num_bytes=10))  # room for it only without one of the used ones
    assert not queue.can_sample()
    assert not queue.offer(entry(4, num_bytes=11))
    assert queue.can_sample()


def test_too_few_bytes_for_a_step_is_an_error_and_no_wait() -> None:
    queue = ReplayQueue[str](make_limits(groups=3, max_bytes=10))
    queue.offer(entry(1, num_bytes=4))
    queue.offer(entry(2, num_bytes=4))
    with pytest.raises(ReplayError, match=r"max_bytes = 10 is full with 2 groups .8 bytes., a step needs 3"):
        queue.offer(entry(3, num_bytes=4))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_uses": 0}, "must be positive"),
        ({"half_life": 0.0}, "must be positive"),
        ({"max_groups": 1}, "must hold min_size = 2"),
        ({"max_uses": 2, "ratio": 3.0, "buffer": 9.0}, "more than max_uses = 2 gives"),
        ({"max_uses": 1, "ratio": 1.0, "buffer": 9.0}, "a plain stream takes no ratio"),
    ],
)
def test_contradictory_limits_are_refused(changes: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make_limits(**changes)  # type: ignore[arg-type]


def test_misuse_is_an_error() -> None:
    queue = ReplayQueue[str](make_limits(max_uses=2))
    with pytest.raises(ReplayError, match="holds 0 groups and 2 more"):
        queue.sample()
    queue.offer(entry(3))
    with pytest.raises(ReplayError, match="record 3 is offered after 3"):
        queue.offer(entry(3))
    for chosen in ([3, 3], [3, 4]):
        with pytest.raises(ReplayError, match="journal's step took"):
            queue.take(chosen)


@st.composite
def any_limits(draw: st.DrawFn) -> ReplayLimits:
    groups = draw(st.integers(1, 3))
    max_uses = draw(st.integers(1, 4))
    ratio = draw(st.sampled_from([None, *(value for value in (1.0, 1.5, 2.0, 4.0) if value <= max_uses)]))
    min_size = groups + draw(st.integers(0, 3))
    return make_limits(
        groups=groups,
        min_size=min_size,
        ratio=ratio if max_uses > 1 else None,
        buffer=max(groups, ratio or 0.0) + draw(st.integers(0, 3)),
        max_uses=max_uses,
        max_groups=min_size + draw(st.integers(0, 8)),
        max_bytes=draw(st.integers(10 * groups, 100)),
        drop_above=draw(st.integers(1, 6)),
        half_life=draw(st.sampled_from([1.0, 4.0, math.inf])),
        seed=draw(st.integers(0, 5)),
    )


@settings(max_examples=50, deadline=None)
@given(any_limits(), st.data())
def test_invariants_hold_whatever_comes(limits: ReplayLimits, data: st.DataObject) -> None:
    """No deadlock, no group twice in a batch, never too often, never too much, and every group accounted for."""
    queue = ReplayQueue[str](limits)
    uses: Counter[int] = Counter()
    drops: list[Drop] = []
    version, dealt_with, pending = 0, 0, None
    for number in range(1, data.draw(st.integers(0, 40), label="arrivals") + 1):
        pending = entry(
            number,
            version=max(0, version - data.draw(st.integers(0, 3))),
            num_bytes=data.draw(st.integers(1, 10)),
            mass=data.draw(st.sampled_from([0.0, 0.5, 3.0])),
        )
        while True:
            accepted = queue.offer(pending)
            assert queue.num_bytes <= limits.max_bytes
            assert queue.num_groups <= limits.max_groups
            assert accepted or queue.can_sample()
            dealt_with += accepted
            if not accepted or (queue.can_sample() and data.draw(st.booleans(), label="step")):
                batch = numbers(queue.sample())
                assert len(set(batch)) == len(batch) == limits.rate.groups_per_sample
                uses.update(batch)
                if data.draw(st.booleans(), label="published"):
                    version += 1
                    queue.advance(version)
            if accepted:
                break
        drops += queue.take_drops()
    assert all(count <= limits.max_uses for count in uses.values())
    assert queue.num_groups + len(drops) == dealt_with
    assert len({drop.number for drop in drops}) == len(drops)
    assert all(drop.uses == uses[drop.number] for drop in drops)
    assert all(drop.uses == limits.max_uses for drop in drops if drop.reason == "exhausted")
    assert all(drop.uses > 0 for drop in drops if drop.reason == "evicted")
    unused = sum(count == 0 for count in queue.snapshot().uses.values())
    if limits.max_uses == 1:
        assert queue.consumed == dealt_with - unused
    else:
        assert queue.consumed == dealt_with


# Sampling


def test_weights_decay_with_age_and_follow_the_mass() -> None:
    weights = np.exp(log_weights(np.array([1.0, 1.0, 3.0, 0.0]), np.array([0, 4, 2, 0]), half_life=2.0))
    np.testing.assert_allclose(weights, [1.0, 0.25, 1.5, 0.0])


def test_order_follows_the_definition_of_drawing_without_replacement() -> None:
    weights = [Fraction(1), Fraction(2), Fraction(5)]
    rng = np.random.default_rng(1)
    num_draws = 20_000
    log_weight_B = np.log(np.array([float(weight) for weight in weights]))
    seen = Counter(tuple(weighted_order(log_weight_B, rng).tolist()) for _ in range(num_draws))
    for order in itertools.permutations(range(3)):
        expected = float(order_probability(weights, order))
        tolerance = 4 * math.sqrt(expected * (1 - expected) / num_draws)
        assert seen[order] / num_draws == pytest.approx(expected, abs=tolerance)


def test_what_weighs_nothing_comes_last_in_order() -> None:
    log_weight_B = log_weights(np.array([0.0, 1e-300, 0.0, 1.0]), np.array([0, 10**6, 0, 0]), half_life=1.0)
    assert weighted_order(log_weight_B, np.random.default_rng(0)).tolist() == [3, 1, 0, 2]


def test_seed_and_number_of_draws_are_the_whole_random_state() -> None:
    def batches(queue: ReplayQueue[str], count: int) -> list[list[int]]:
        return [numbers(queue.sample()) for _ in range(count)]

    limits = make_limits(groups=3, max_uses=50, seed=7)
    entries = [entry(number) for number in range(1, 21)]
    queue = ReplayQueue[str](limits)
    for each in entries:
        queue.offer(each)
    first = batches(queue, 3)
    snapshot = ReplaySnapshot.model_validate_json(queue.snapshot().model_dump_json())
    rest = batches(queue, 5)
    assert len(set(map(tuple, rest))) > 1
    assert batches(ReplayQueue(limits, snapshot, reversed(entries)), 5) == rest
    redone = ReplayQueue[str](limits)
    for each in entries:
        redone.offer(each)
    for batch in first:
        redone.take(batch)
    assert redone.snapshot() == snapshot
    assert batches(redone, 5) == rest
    other = ReplayQueue(make_limits(groups=3, max_uses=50, seed=8), snapshot, entries)
    assert batches(other, 5) != rest


def test_a_member_the_journal_lost_is_an_error() -> None:
    snapshot = ReplaySnapshot(uses={4: 0, 6: 1}, last_number=6)
    with pytest.raises(ReplayError, match=r"1 of 2 groups .*record 6 is the first"):
        ReplayQueue[str](make_limits(), snapshot, [entry(4), entry(5)])


# Bias


def test_bias_meter_sees_that_long_and_hard_groups_are_starved() -> None:
    meter = BiasMeter()
    assert math.isnan(meter.length_ratio)
    short, long = GroupShape(100, 0.2), GroupShape(900, 0.8)
    for shape in (short, long):
        meter.generated(shape)
    meter.trained(short)
    meter.dropped("stale", long)
    meter.dropped("stale", GroupShape(1024, 1.0))
    meter.dropped("stale", GroupShape(0, 1.0))
    assert meter.length_ratio == pytest.approx(100 / 500)
    assert meter.difficulty_gap == pytest.approx(0.2 - 0.5)
    assert meter.dropped_by_length("stale") == {0: 1, 1024: 2}
    assert meter.dropped_by_length("evicted") == {}
    restored = BiasMeter(BiasState.model_validate_json(meter.state().model_dump_json()))
    assert restored.state() == meter.state()


@pytest.mark.parametrize(("length", "bucket"), [(0, 0), (1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (1025, 2048)])
def test_length_buckets_are_powers_of_two(length: int, bucket: int) -> None:
    assert GroupShape(length, 0.0).bucket == bucket


# Exactness: journal + checkpoint -> batches


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
