"""Watermarks: the mark is the longest finished prefix, whatever the order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.watermarks import Watermarks


@given(st.permutations(range(1, 12)), st.integers(0, 11))
def test_the_mark_is_the_longest_finished_prefix(order: list[int], finished: int) -> None:
    marks = Watermarks({})
    for seq in order[:finished]:
        marks.done("a", seq)
    done = set(order[:finished])
    expected = next(n for n in range(12) if n + 1 not in done)
    assert marks.snapshot().get("a", 0) == expected


def test_producers_are_independent_and_marks_continue() -> None:
    marks = Watermarks({"a": 4})
    marks.done("b", 1)
    marks.done("a", 5)
    assert marks.snapshot() == {"a": 5, "b": 1}


def test_doing_a_number_twice_is_an_error() -> None:
    marks = Watermarks({"a": 4})
    with pytest.raises(ValueError, match="a 4 was done before"):
        marks.done("a", 4)
