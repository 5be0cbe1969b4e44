"""The proof on hand-made histories: a good one passes, and each way of being bad is named."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from tests.chaos.ledger import Entry, Group, Step, What, digest
from tests.chaos.proof import Bounds, Remains, check

BOUNDS = Bounds(groups_per_step=2, drop_above=3, max_bytes={"queue": 100})


def entry(what: What, who: str = "learner-1", **fields) -> Entry:
    return Entry(0, who, what, fields)


def group(index: int, *, producer: str = "a.0", seq: int | None = None, min_version: int = 0) -> Group:
    return Group(producer, index + 1 if seq is None else seq, index, min_version)


HISTORY = (Step(0, (group(0), group(1))), Step(1, (group(3), group(4, min_version=1))))
GOOD = [
    *(entry("leased", "actor-1", index=index) for index in range(7)),
    *(entry("received", producer="a.0", seq=index + 1, index=index) for index in (0, 1, 2, 3, 4)),
    entry("discarded", producer="a.0", seq=3, index=2, reason="zero_variance"),
    entry("published", version=0, weights="aa"),
    entry("adopted", "actor-1", version=0, weights="aa"),
    entry("checkpoint", step=1, version=1, digest=digest(HISTORY[:1])),
    entry("step", number=10, step=2, indices=[3, 4]),
    entry("published", version=1, weights="bb"),
    entry("sampled", place="queue", bytes=100),
    entry("checkpoint", step=2, version=2, digest=digest(HISTORY)),
]
REMAINS = Remains(
    history=HISTORY, consumed=5, frontier=7, held={"queue": frozenset({5}), "todo": frozenset({6})},
    counted_bytes=10, queued_bytes=10,
)  # fmt: skip


def kinds(entries: Sequence[Entry] = GOOD, remains: Remains = REMAINS, bounds: Bounds = BOUNDS) -> list[str]:
    return [violation.kind for violation in check(entries, remains, bounds)]


def test_a_run_that_kept_its_promises_has_no_violation() -> None:
    assert check(GOOD, REMAINS, BOUNDS) == []


def test_a_group_that_was_received_and_is_nowhere_is_lost() -> None:
    held = {**REMAINS.held, "queue": frozenset()}
    assert kinds([*GOOD, entry("received", producer="b.0", seq=1, index=5)], replace(REMAINS, held=held)) == ["lost"]


@pytest.mark.parametrize("reason", ["quarantined", "malformed", "unleased"])
def test_a_group_that_nobody_could_read_is_lost(reason: str) -> None:
    entries = [replace(e, fields={**e.fields, "reason": reason}) if e.what == "discarded" else e for e in GOOD]
    assert "lost" in kinds(entries)


def test_a_committed_group_is_lost_even_if_its_prompt_was_answered_again() -> None:
    first = entry("received", producer="b.0", seq=1, index=4)
    committed = entry("committed", watermarks={"b.0": 1})
    assert kinds([*GOOD, first]) == [], "its actor still has it"
    assert kinds([*GOOD, first, committed]) == ["lost"]
    assert kinds([*GOOD, first, committed], replace(REMAINS, kept=frozenset({("b.0", 1)}))) == []
    duplicate = entry("discarded", producer="b.0", seq=1, index=4, reason="duplicate")
    assert kinds([*GOOD, first, committed, duplicate]) == []


def test_a_prompt_that_was_leased_and_is_nowhere_is_skipped() -> None:
    assert kinds(remains=replace(REMAINS, held={"queue": frozenset({5})})) == ["skipped"]
    assert kinds([*GOOD, entry("leased", "actor-2", index=7)]) == ["skipped"]


def test_a_prompt_below_the_frontier_that_nobody_ever_leased_is_skipped() -> None:
    assert kinds(remains=replace(REMAINS, frontier=9)) == ["skipped", "skipped"]


def test_a_duplicate_is_no_answer() -> None:
    only_duplicate = [e for e in GOOD if e.what != "discarded"] + [
        entry("discarded", producer="a.0", seq=3, index=2, reason="duplicate")
    ]
    assert kinds(only_duplicate, replace(REMAINS, consumed=4)) == ["lost"]


def test_an_index_in_two_steps_was_trained_twice() -> None:
    history = (*HISTORY, Step(2, (group(3), group(5))))
    again = replace(REMAINS, history=history, consumed=6, held={"todo": frozenset({6})})
    assert kinds(remains=again) == ["twice"]
    assert kinds(remains=again, bounds=replace(BOUNDS, max_uses=2)) == []


def test_an_index_answered_by_two_groups_was_trained_twice_whatever_the_uses() -> None:
    history = (*HISTORY, Step(2, (group(3, producer="b.0"), group(5))))
    again = replace(REMAINS, history=history, consumed=6, held={"todo": frozenset({6})})
    assert kinds(remains=again, bounds=replace(BOUNDS, max_uses=2)) == ["twice"]


@pytest.mark.parametrize("what", ["published", "adopted"])
def test_a_number_on_two_sets_of_weights_was_reused(what: What) -> None:
    assert kinds([*GOOD, entry(what, "x", version=1, weights="cc")]) == ["version_reused"]
    assert kinds([*GOOD, entry(what, "x", version=1, weights="bb")]) == []


@pytest.mark.parametrize(("min_version", "is_stale"), [(0, True), (1, False), (4, False), (5, True)])
def test_staleness_above_the_bound_or_from_the_future(min_version: int, is_stale: bool) -> None:
    history = (*HISTORY, Step(4, (group(5, min_version=4), group(6, min_version=min_version))))
    remains = replace(REMAINS, history=history, consumed=7, held={})
    assert kinds(remains=remains) == ["stale"] * is_stale


def test_bytes_above_the_budget() -> None:
    assert kinds([*GOOD, entry("sampled", "scene", place="queue", bytes=101)]) == ["over_budget"]
    assert kinds([*GOOD, entry("sampled", "scene", place="elsewhere", bytes=10**9)]) == []


def test_a_checkpoint_that_the_final_policy_does_not_go_on_from() -> None:
    other = digest([Step(0, (group(0), group(5)))])
    assert kinds([*GOOD, entry("checkpoint", step=1, version=1, digest=other)]) == ["rewritten"]
    assert kinds([*GOOD, entry("checkpoint", step=3, version=1, digest=digest(HISTORY))]) == ["rewritten"]


def journaled(number: int, who: str, *, step: int, indices: Sequence[int] = (5, 6)) -> Entry:
    return entry("step", who, number=number, step=step, indices=list(indices))


def opened(fence: int, next_number: int) -> list[Entry]:
    """``learner-<fence>`` takes over and finds records below ``next_number``."""
    who = f"learner-{fence}"
    return [entry("claimed", who, fence=fence), entry("opened", who, next=next_number)]


def test_a_journaled_step_that_was_trained_otherwise_or_not_at_all() -> None:
    assert kinds([*GOOD, journaled(12, "learner-1", step=2, indices=(4, 3))]) == ["rewritten"]
    assert kinds([*GOOD, journaled(12, "learner-1", step=3)]) == ["rewritten"]


def test_what_a_fenced_learner_journals_behind_its_successors_history_does_not_count() -> None:
    """GOOD's second step is learner-1's, of fence 1, and has number 10."""
    taken_over = [*opened(1, 1), *GOOD, *opened(2, 11)]
    assert kinds([*taken_over, journaled(11, "learner-1", step=3)]) == [], "no successor came to a third step"
    assert kinds([*taken_over, journaled(11, "learner-1", step=2, indices=(4, 3))]) == []
    assert kinds([*taken_over, journaled(11, "learner-2", step=3)]) == ["rewritten"], "it holds the last fence"
    in_time = journaled(10, "learner-1", step=3)
    assert kinds([*taken_over, in_time]) == ["rewritten"], "its successor must have found it"
    woken = journaled(11, "learner-1", step=3)
    assert kinds([*taken_over, in_time, woken]) == ["rewritten"], "whatever was written later"
    again = journaled(11, "learner-2", step=2)
    assert kinds([*taken_over, again]) == ["rewritten"], "it was to train what it found"


def test_a_successor_that_died_before_it_opened_the_journal_excuses_nobody() -> None:
    entries = [*opened(1, 1), *GOOD, *opened(2, 11)[:1], journaled(11, "learner-1", step=3), *opened(3, 12)]
    assert kinds(entries) == ["rewritten"]


def test_a_step_that_a_successor_chose_again_is_the_successors() -> None:
    replaced = journaled(10, "learner-0", step=2, indices=(4, 3))
    assert kinds([entry("claimed", "learner-0", fence=0), replaced, *opened(1, 10), *GOOD]) == []


@pytest.mark.parametrize(
    "changes", [{"counted_bytes": 11}, {"orphans": 1}, {"consumed": 4}, {"history": (Step(0, (group(0),)), HISTORY[1])}]
)
def test_counters_that_disagree_with_what_is_there(changes: dict[str, object]) -> None:
    assert "miscounted" in kinds(remains=replace(REMAINS, **changes))


def test_a_group_that_the_learner_discarded_and_still_holds_is_not_consumed() -> None:
    discarded = entry("discarded", producer="b.0", seq=1, index=5, reason="stale")
    held = {"todo": frozenset({6}), "learner": frozenset({5})}
    assert kinds([*GOOD, discarded], replace(REMAINS, held=held)) == []
    assert kinds([*GOOD, discarded]) == ["miscounted"], "in the queue it can only be a copy"


def test_more_calls_than_were_attempted() -> None:
    attempts = [entry("attempted", "actor-1"), entry("attempted", "actor-1")]
    assert kinds([*GOOD, *attempts], replace(REMAINS, executed=2)) == []
    assert kinds([*GOOD, *attempts], replace(REMAINS, executed=3)) == ["retried"]


def test_a_run_that_does_not_end_is_stuck() -> None:
    assert kinds(remains=replace(REMAINS, problems=("no step for 30 s",))) == ["stuck"]
