"""The batcher and the ingest thread: every delivery is accounted for exactly once."""

import threading
from collections.abc import Iterator, Sequence

import pytest

from lambdapo_async.broker.interface import Delivery, Descriptor
from lambdapo_async.config import RunConfig
from lambdapo_async.errors import BrokerError, BrokerUnavailable, TaskError
from lambdapo_async.rollout import Lease, RolloutGroup
from lambdapo_async.wire import encode_group
from learner.batcher import Batcher
from learner.evaluation import Evaluation
from learner.ingest import Ingest
from learner.watermarks import Watermarks
from tests.groups import VOCAB_SIZE, make_group

CONFIG = RunConfig.model_validate(
    {
        "model": {"path": "starter"},
        "task": {"kind": "arithmetic"},
        "rollout": {"group_size": 2, "groups_per_step": 2},
        "staleness": {"max_staleness": 1, "drop_above": 3},
        "learner": {"data_timeout_s": 5.0},
        "evaluation": {"every_steps": 5, "num_prompts": 2},
    }
)


NEVER = threading.Event()


def do_nothing() -> None:
    """While idle."""


class ListSource:
    """Delivers what it was given, then nothing."""

    def __init__(self, *deliveries: Delivery | Exception) -> None:
        self._deliveries = list(deliveries)
        self.released: list[int] = []
        self.quarantined: list[str] = []
        self.asked: list[Lease] = []
        self.empty = threading.Event()

    def read(self, max_groups: int, *, timeout_s: float) -> list[Delivery]:
        if not self._deliveries:
            self.empty.set()
            return []
        head = self._deliveries.pop(0)
        if isinstance(head, Exception):
            raise head
        return [head]

    def release(self, consumed: int) -> None:
        self.released.append(consumed)

    def quarantine(self, descriptor: Descriptor, payload: bytes, reason: str) -> None:
        self.quarantined.append(reason)

    def request_evaluation(self, leases: Sequence[Lease]) -> None:
        self.asked.extend(leases)


def delivery(seq: int, group: RolloutGroup, *, payload: bytes | None = None, producer: str = "p") -> Delivery:
    content = encode_group(group) if payload is None else payload
    return Delivery(Descriptor(producer, seq, group.lease, group.min_version, len(content), 0.5), content)


class Bench:
    """A batcher on a list."""

    def __init__(self, *deliveries: Delivery | Exception, config: RunConfig = CONFIG) -> None:
        self.source = ListSource(*deliveries)
        self.evaluation = Evaluation(self.source, config.evaluation, num_rows=10)  # type: ignore[arg-type]
        self.ingest = Ingest(self.source, config, vocab_size=VOCAB_SIZE, newest_version=lambda: 50)  # type: ignore[arg-type]
        self.batcher = Batcher(
            self.ingest,
            self.source,  # type: ignore[arg-type]
            self.evaluation,
            config,
            watermarks=Watermarks({}),
            consumed=0,
            next_index=0,
        )
        self.ingest.start()


@pytest.fixture
def bench() -> Iterator[type[Bench]]:
    benches: list[Bench] = []

    class Tracked(Bench):
        def __init__(self, *args: Delivery | Exception, config: RunConfig = CONFIG) -> None:
            super().__init__(*args, config=config)
            benches.append(self)

    yield Tracked
    for made in benches:
        made.ingest.close()


def test_a_batch_is_the_first_groups_with_a_signal(bench: type[Bench]) -> None:
    on = bench(
        delivery(1, make_group(0, rewards=(1.0, 1.0), version=9)),
        delivery(2, make_group(1, rewards=(0.0, 1.0), version=9)),
        delivery(3, make_group(2, rewards=(0.0, 1.0), version=5)),
        delivery(4, make_group(3), payload=b"garbage"),
        delivery(5, make_group(4, rewards=(1.0, 0.0), version=7)),
    )
    batch = on.batcher.next_batch(10, stopping=NEVER, while_idle=do_nothing)
    assert [received.group.lease.index for received in batch.groups] == [1, 4]
    assert dict(batch.discarded) == {"zero_variance": 1, "stale": 1, "malformed": 1}
    assert batch.staleness(10).tolist() == [1, 3]
    assert [group.lease.index for group in batch.seen] == [0, 1, 2, 4]
    assert len(on.source.quarantined) == 1
    assert on.source.released == [1, 2, 3]
    assert (on.batcher.watermarks(), on.batcher.durable_consumed) == ({}, 0)
    on.batcher.trained(batch)
    assert (on.batcher.watermarks(), on.batcher.durable_consumed) == ({"p": 5}, 5)


def test_a_stopped_batch_counts_nothing_as_done(bench: type[Bench]) -> None:
    on = bench(delivery(1, make_group(0, rewards=(1.0, 1.0))), delivery(2, make_group(1)))
    assert on.source.empty.wait(10)
    stopping = threading.Event()
    stopping.set()
    assert on.batcher.next_batch(0, stopping=stopping, while_idle=do_nothing) is None
    assert (on.batcher.watermarks(), on.batcher.durable_consumed) == ({}, 0)


def test_marks_move_only_over_what_is_done(bench: type[Bench]) -> None:
    on = bench(*(delivery(i + 1, make_group(i)) for i in range(4)))
    first = on.batcher.next_batch(0, stopping=NEVER, while_idle=do_nothing)
    assert on.batcher.watermarks().get("p", 0) == 0
    on.batcher.trained(first)
    assert (on.batcher.watermarks(), on.batcher.consumed, on.batcher.next_index) == ({"p": 2}, 2, 2)
    on.batcher.next_batch(0, stopping=NEVER, while_idle=do_nothing)
    assert on.batcher.watermarks() == {"p": 2}


def test_held_out_answers_go_to_the_evaluation(bench: type[Bench]) -> None:
    answers = [make_group(rewards=(reward,), lease=Lease("heldout", i, 5)) for i, reward in enumerate((1.0, 0.0))]
    on = bench(
        delivery(1, answers[0]),
        delivery(2, make_group(0)),
        delivery(3, answers[1]),
        delivery(4, make_group(1)),
    )
    on.evaluation.ask(5)
    assert [lease.id for lease in on.source.asked] == ["heldout:5:0", "heldout:5:1"]
    batch = on.batcher.next_batch(0, stopping=NEVER, while_idle=do_nothing)
    (result,) = on.evaluation.take_finished()
    assert (result.step, result.reward, len(result.groups)) == (5, 0.5, 2)
    assert on.evaluation.take_finished() == []
    assert on.batcher.watermarks() == {"p": 1}
    on.batcher.trained(batch)
    assert on.batcher.watermarks() == {"p": 4}
    assert on.batcher.consumed == 2


def test_an_answer_to_a_closed_round_is_done_but_not_counted(bench: type[Bench]) -> None:
    on = bench(delivery(1, make_group(rewards=(1.0,), lease=Lease("heldout", 0, 3))))
    on.batcher.serve_evaluation()
    assert on.batcher.watermarks() == {"p": 1}
    assert on.evaluation.take_finished() == []


def test_no_data_is_an_error_with_the_key_to_change(bench: type[Bench]) -> None:
    impatient = CONFIG.model_copy(update={"learner": CONFIG.learner.model_copy(update={"data_timeout_s": 0.05})})
    with pytest.raises(BrokerUnavailable, match=r"learner.data_timeout_s = 0.05"):
        bench(config=impatient).batcher.next_batch(0, stopping=NEVER, while_idle=do_nothing)


def test_what_the_thread_died_of_reaches_the_loop(bench: type[Bench]) -> None:
    with pytest.raises(BrokerError, match="gap"):
        bench(BrokerError("gap")).batcher.next_batch(0, stopping=NEVER, while_idle=do_nothing)


def test_a_payload_of_another_lease_is_quarantined(bench: type[Bench]) -> None:
    on = bench(
        delivery(1, make_group(0), payload=encode_group(make_group(7))),
        delivery(2, make_group(1)),
        delivery(3, make_group(2)),
    )
    batch = on.batcher.next_batch(0, stopping=NEVER, while_idle=do_nothing)
    assert dict(batch.discarded) == {"malformed": 1}
    assert "its entry train:0:0" in on.source.quarantined[0]


def test_filtering_can_be_turned_off(bench: type[Bench]) -> None:
    keep = CONFIG.model_copy(update={"rollout": CONFIG.rollout.model_copy(update={"filter_zero_variance": False})})
    on = bench(*(delivery(i + 1, make_group(i, rewards=(1.0, 1.0))) for i in range(2)), config=keep)
    assert len(on.batcher.next_batch(0, stopping=NEVER, while_idle=do_nothing).groups) == 2


@pytest.mark.parametrize(
    ("group", "reason"),
    [
        (make_group(0, rewards=(0.0, 1.0, 0.5)), "has 3 rollouts, this run asks for 2"),
        (make_group(lease=Lease("heldout", 0, 5), rewards=(0.0, 1.0)), "has 2 rollouts, this run asks for 1"),
        (make_group(lease=Lease("heldout", 2, 5), rewards=(1.0,)), "none of the 2 held-out prompts"),
        (make_group(0, num_tokens=1025), "a completion of 1025 tokens"),
    ],
)
def test_a_valid_message_that_the_run_never_asked_for_is_quarantined(
    bench: type[Bench], group: RolloutGroup, reason: str
) -> None:
    on = bench(delivery(1, group), delivery(2, make_group(1)), delivery(3, make_group(2)))
    batch = on.batcher.next_batch(0, stopping=NEVER, while_idle=do_nothing)
    assert batch is not None
    assert len(batch.groups) == 2
    assert reason in on.source.quarantined[0]


def test_an_evaluation_goes_on_without_an_unreadable_answer(bench: type[Bench]) -> None:
    good, bad = (make_group(rewards=(1.0,), lease=Lease("heldout", i, 5)) for i in range(2))
    on = bench(delivery(1, bad, payload=b"garbage"), delivery(2, good))
    on.evaluation.ask(5)
    while on.evaluation.is_open(5):
        on.batcher.serve_evaluation()
    (result,) = on.evaluation.take_finished()
    assert (result.reward, len(result.groups)) == (1.0, 1)


def test_a_round_answered_before_a_restart_is_not_asked_again() -> None:
    source = ListSource()
    evaluation = Evaluation(source, CONFIG.evaluation, num_rows=10, answered={5})  # type: ignore[arg-type]
    assert not evaluation.is_due(5)
    assert evaluation.is_due(10)


def test_rewards_that_are_always_equal_end_the_run_with_advice(bench: type[Bench]) -> None:
    on = bench(*(delivery(i + 1, make_group(i, rewards=(0.0, 0.0))) for i in range(120)))
    with pytest.raises(TaskError, match=r"100 groups for one step.*task.rewards"):
        on.batcher.next_batch(0, stopping=NEVER, while_idle=do_nothing)
