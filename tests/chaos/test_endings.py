"""What processes said when they ended by themselves, on hand-made endings."""

import pytest

from tests.chaos.endings import MOST_ENDS, bad_endings
from tests.chaos.ledger import Entry

FENCED = "error: another learner owns the run now (fence {}): this one must stop"


def ended(who: str, returncode: int, said: str, *, is_expected: bool = False) -> Entry:
    fields = {"process": who, "returncode": returncode, "said": said, "is_expected": is_expected}
    return Entry(0, "scene", "ended", fields)


def test_who_was_killed_or_came_to_its_end_needs_no_reason() -> None:
    assert bad_endings([ended("learner-1", -9, "anything"), ended("actor-1", 0, "ValueError: no error")]) == []


@pytest.mark.parametrize("is_expected", [True, False])
def test_a_traceback_is_never_fine(is_expected: bool) -> None:
    (violation,) = bad_endings([ended("learner-3", 1, "ValueError: 7 is no step", is_expected=is_expected)])
    assert (violation.kind, violation.detail) == ("crashed", "learner-3 ended with 1: ValueError: 7 is no step")


def test_what_an_actor_may_say_a_learner_may_not() -> None:
    said = "error: this Redis holds no run 'chaos': check the run id and the URL"
    assert bad_endings([ended("actor-1", 2, said)]) == []
    assert [violation.kind for violation in bad_endings([ended("learner-1", 2, said)])] == ["crashed"]


def test_a_loop_of_learners_is_no_end() -> None:
    ends = [ended(f"learner-{number}", 1, FENCED.format(number)) for number in range(MOST_ENDS + 1)]
    assert bad_endings(ends[:-1]) == []
    (violation,) = bad_endings(ends)
    assert violation.detail.startswith(f"{MOST_ENDS + 1} learners ended one after another")


def test_learners_that_were_replaced_are_no_loop() -> None:
    assert bad_endings([ended("learner-1", 1, FENCED.format(number), is_expected=True) for number in range(20)]) == []
