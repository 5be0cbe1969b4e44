"""Receipts against a slow oracle that remembers every message and every prompt."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lambdapo_async.broker.interface import Descriptor
from lambdapo_async.journal.receipts import DUPLICATE, MAX_AHEAD, UNLEASED, Receipts, ReceiptsState
from lambdapo_async.journal.records import GroupRecord
from lambdapo_async.rollout import Lease, Split


def record(producer: str, seq: int, index: int, *, split: Split = "train", discarded: str = "") -> GroupRecord:
    return GroupRecord(Descriptor(producer, seq, Lease(split, index), 0, 3, 0.5), b"abc", discarded)


@dataclass
class Oracle:
    """Every message and prompt ever seen."""

    messages: set[tuple[str, int]] = field(default_factory=set)
    answered: set[int] = field(default_factory=set)

    def add(self, producer: str, seq: int, index: int, split: Split) -> bool:
        """Whether it may be trained on."""
        self.messages.add((producer, seq))
        is_new = split == "train" and index not in self.answered
        if split == "train":
            self.answered.add(index)
        return is_new

    def holes(self) -> tuple[int, ...]:
        return tuple(index for index in range(max(self.answered, default=0)) if index not in self.answered)


deliveries = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 30), st.sampled_from(["train", "train", "heldout"])), max_size=40
)


@given(deliveries, st.data())
def test_every_prompt_is_taken_once_and_every_message_is_known(
    arrivals: list[tuple[str, int, Split]], data: st.DataObject
) -> None:
    oracle, receipts, history = Oracle(), Receipts(), list[GroupRecord]()
    last: dict[str, int] = {}
    for producer, index, split in arrivals:
        seq = last[producer] = last.get(producer, 0) + 1
        fresh = record(producer, seq, index, split=split)
        assert not receipts.is_known(fresh.descriptor)
        judged = receipts.judge(fresh)
        is_new = oracle.add(producer, seq, index, split)
        assert (judged.discarded == DUPLICATE) == (split == "train" and not is_new)
        assert judged.payload == (b"" if judged.discarded else b"abc")
        receipts.add(judged)
        history.append(judged)
        if data.draw(st.booleans()):  # a checkpoint, read back, and part of the journal once more
            receipts = Receipts(ReceiptsState.model_validate_json(receipts.state().model_dump_json()))
            for again in history[data.draw(st.integers(0, len(history))) :]:
                receipts.add(again)
    assert all(receipts.is_known(one.descriptor) for one in history)
    state = receipts.state()
    assert state.watermarks == last
    assert state.next_index == max(oracle.answered, default=-1) + 1
    assert state.holes == oracle.holes()
    assert receipts.num_received == len(oracle.answered)


def test_a_number_that_the_queue_set_aside_leaves_no_gap() -> None:
    receipts = Receipts()
    receipts.add(record("a", 3, 0))
    assert receipts.state().watermarks == {"a": 3}
    assert receipts.is_known(record("a", 2, 7).descriptor)


def test_a_malformed_answer_is_an_answer() -> None:
    receipts = Receipts()
    receipts.add(record("a", 1, 0, discarded="malformed"))
    assert receipts.judge(record("b", 1, 0)).discarded == DUPLICATE


@pytest.mark.parametrize("ahead", [MAX_AHEAD, 2**60])
def test_an_index_that_nobody_leased_makes_no_holes(ahead: int) -> None:
    receipts = Receipts(ReceiptsState(next_index=5))
    judged = receipts.judge(record("a", 1, 5 + ahead))
    assert (judged.discarded, judged.payload) == (UNLEASED, b"")
    receipts.add(judged)
    assert receipts.state() == ReceiptsState(watermarks={"a": 1}, next_index=5)
    assert receipts.judge(record("a", 2, 5 + MAX_AHEAD - 1)).discarded == ""
