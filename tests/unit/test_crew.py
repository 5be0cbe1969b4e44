from collections.abc import Sequence
from pathlib import Path

import pytest

from lambdapo_async.rollout import RolloutGroup
from lambdapo_async.wire import encode_group
from learner.crew import Crew, take_orders
from learner.parallel import ALONE, Ranks
from tests.groups import make_group
from tests.ranks import run_ranks

VOCAB = 1000


class Diary:
    """Writes down what it is told to do."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def train(self, groups: Sequence[RolloutGroup], *, version: int) -> None:
        self.told.append([version, *(encode_group(each) for each in groups)])

    def publish(self) -> None:
        self.told.append("publish")

    def score(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> None:
        self.told.append([prompt_ids, completion_ids])

    def save(self, folder: Path) -> None:
        self.told.append(str(folder))


GROUPS = [make_group(0), make_group(1)]


def one_step(ranks: Ranks, folder: Path) -> list[object]:
    diary = Diary()
    if ranks.is_main:
        crew = Crew(ranks)
        crew.train(GROUPS, version=5)
        crew.publish()
        crew.score([1, 2], (3,))
        ranks.send(b"")  # a pulse
        crew.save(folder)
        crew.finish()
    else:
        take_orders(ranks, diary, vocab_size=VOCAB)
    return diary.told


def test_orders_arrive_as_given(tmp_path: Path) -> None:
    expected = [[5, *map(encode_group, GROUPS)], "publish", [[1, 2], [3]], str(tmp_path)]
    assert run_ranks(tmp_path, 3, one_step, tmp_path) == [[], expected, expected]


def unknown(ranks: Ranks) -> None:
    if ranks.is_main:
        Crew(ranks)._order("dance")
    else:
        take_orders(ranks, Diary(), vocab_size=VOCAB)


def test_an_unknown_order_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="rank 0 ordered 'dance'"):
        run_ranks(tmp_path, 2, unknown)


def test_alone_nobody_is_ordered_about() -> None:
    crew = Crew(ALONE)
    crew.train(GROUPS, version=0)
    crew.publish()
    crew.score([1], [2])
    crew.save(Path("nowhere"))
    crew.finish()
