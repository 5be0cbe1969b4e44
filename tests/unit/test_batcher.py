"""The batcher and the ingest thread: every delivery is accounted for exactly once."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lambdapo_async.broker.interface import Delivery, Durable
from lambdapo_async.config import RunConfig
from lambdapo_async.errors import BrokerError, LostDataError, NoGroupsError, TaskError
from lambdapo_async.journal.records import GroupRecord, StepRecord
from lambdapo_async.rollout import Lease, RolloutGroup
from lambdapo_async.wire import encode_group
from learner.evaluation import Evaluation
from tests.batcher_bench import CONFIG, Bench, ListSource, delivery, indices
from tests.groups import make_group


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    benches: list[Bench] = []

    def made(*args: Delivery | Exception, config: RunConfig = CONFIG) -> Bench:
        benches.append(Bench(tmp_path / str(len(benches)), *args, config=config))
        return benches[-1]

    yield made
    for each in benches:
        each.close()


def test_a_batch_is_the_first_groups_with_a_signal(bench: Callable[..., Bench]) -> None:
    on = bench(
        delivery(1, make_group(0, rewards=(1.0, 1.0), version=9)),
        delivery(2, make_group(1, rewards=(0.0, 1.0), version=9)),
        delivery(3, make_group(2, rewards=(0.0, 1.0), version=5)),
        delivery(4, make_group(3), payload=b"garbage"),
        delivery(5, make_group(4, rewards=(1.0, 0.0), version=7)),
    )
    batch = on.next_batch(10)
    assert indices(batch) == [1, 4]
    assert batch is not None
    assert batch.totals == {"trained": 2, "zero_variance": 1, "stale": 1, "malformed": 1}
    assert batch.staleness().tolist() == [1, 3]
    assert batch.arrived["frac_reward_zero_std"] == 1 / 4
    assert len(on.source.quarantined) == 1
    assert on.source.released == [1, 2, 3]  # the batch's own two come with the version that it makes
    assert on.pool.consumed == 5


def test_what_is_handed_over_is_durable_and_gone_from_redis(bench: Callable[..., Bench]) -> None:
    on = bench(
        delivery(1, make_group(0, rewards=(1.0, 1.0))),
        delivery(2, make_group(1), payload=b"garbage"),
        delivery(1, make_group(rewards=(1.0,), lease=Lease("heldout", 0, 3)), producer="q"),
    )
    assert on.source.empty.wait(10)
    assert on.source.committed == {"p": 2, "q": 1}
    kept = [(record.discarded, bool(record.payload)) for record in on.records() if isinstance(record, GroupRecord)]
    assert kept == [("zero_variance", True), ("malformed", False), ("", True)]
    assert on.book.durable(consumed=1) == Durable(
        watermarks={"p": 2, "q": 1}, consumed=1, waiting=1, next_index=2, holes=()
    )


def test_a_second_answer_is_counted_and_never_trained_on(bench: Callable[..., Bench]) -> None:
    again = delivery(1, make_group(0, rewards=(1.0, 0.0)), producer="renamed")
    on = bench(delivery(1, make_group(0)), again, again, delivery(2, make_group(1)))
    assert indices(on.next_batch(0)) == [0, 1]
    assert on.source.duplicates == {("renamed", 1)}
    assert on.source.committed == {"p": 2, "renamed": 1}
    assert on.pool.totals == {"trained": 2, "duplicate": 1}
    assert on.pool.consumed == 2
    assert [record.discarded for record in on.records() if isinstance(record, GroupRecord)] == ["", "duplicate", ""]


def test_the_step_is_written_down_before_anybody_trains_on_it(bench: Callable[..., Bench]) -> None:
    on = bench(
        delivery(1, make_group(0, version=4)),
        delivery(2, make_group(1, version=9)),
        delivery(3, make_group(2, version=9)),
    )
    on.next_batch(9)
    assert on.records()[-1] == StepRecord(1, 9, 3, (2, 3), ((1, "stale"), (2, "exhausted"), (3, "exhausted")))


def test_a_stopped_batch_leaves_a_pool_that_goes_on(bench: Callable[..., Bench]) -> None:
    on = bench(delivery(1, make_group(0, rewards=(1.0, 1.0))), delivery(2, make_group(1)))
    assert on.source.empty.wait(10)
    stopping = threading.Event()
    stopping.set()
    assert on.next_batch(0, stopping) is None
    assert (on.pool.taken, on.pool.consumed) == (0, 0)


def test_an_error_of_redis_loses_nothing_that_was_journaled(bench: Callable[..., Bench]) -> None:
    on = bench(delivery(1, make_group(0)), LostDataError("gone"), delivery(2, make_group(1)))
    with pytest.raises(LostDataError, match="gone"):
        on.next_batch(0)
    assert on.pool.num_groups == 1
    on.ingest.go_on()
    assert indices(on.next_batch(0)) == [0, 1]


def test_a_commit_that_redis_forgot_still_hands_the_groups_over(bench: Callable[..., Bench]) -> None:
    on = bench()
    on.source.commit = _lose_once(on.source.commit)  # type: ignore[method-assign]
    on.source._deliveries += [delivery(1, make_group(0)), delivery(2, make_group(1))]
    with pytest.raises(LostDataError):
        on.next_batch(0)
    on.ingest.go_on()
    assert indices(on.next_batch(0)) == [0, 1]


def _lose_once(commit: Callable[..., None]) -> Callable[..., None]:
    lost: list[bool] = []

    def lossy(*args: object, **kwargs: object) -> None:
        if not lost:
            lost.append(True)
            raise LostDataError("gone")
        commit(*args, **kwargs)

    return lossy


def test_what_was_not_taken_is_bounded_and_what_waits_blocks(bench: Callable[..., Bench]) -> None:
    size = len(encode_group(make_group(0)))
    tight = CONFIG.model_copy(update={"replay": CONFIG.replay.model_copy(update={"max_bytes": 4 * 3 * size + 4})})
    on = bench(*(delivery(i + 1, make_group(i)) for i in range(20)), config=tight)
    while on.source.committed.get("p", 0) < 4:  # three are handed over, the fourth waits for room
        threading.Event().wait(0.001)
    assert on.ingest._hand_over.num_bytes <= 3 * size + 1
    assert on.source.committed == {"p": 4}
    assert [indices(on.next_batch(0)) for _ in range(10)] == [[2 * i, 2 * i + 1] for i in range(10)]


def test_reuse_draws_from_everything_that_is_here(bench: Callable[..., Bench]) -> None:
    replay = CONFIG.replay.model_copy(update={"max_uses": 3, "samples_per_insert": 2.0, "error_buffer": 4.0})
    on = bench(*(delivery(i + 1, make_group(i)) for i in range(8)), config=CONFIG.model_copy(update={"replay": replay}))
    uses = Counter(index for _ in range(6) for index in indices(on.next_batch(0)))
    assert max(uses.values()) in (2, 3)
    assert len(uses) > 4
    # Consumed when they went in: the gate does not wait for their last use.
    assert on.source.released[-1] == on.pool.consumed >= len(uses)


def test_held_out_answers_go_to_the_evaluation(bench: Callable[..., Bench]) -> None:
    answers = [make_group(rewards=(reward,), lease=Lease("heldout", i, 5)) for i, reward in enumerate((1.0, 0.0))]
    on = bench(
        delivery(1, answers[0]),
        delivery(2, make_group(0)),
        delivery(3, answers[1]),
        delivery(4, make_group(1)),
    )
    on.evaluation.ask(5)
    assert [lease.id for lease in on.source.asked] == ["heldout:5:0", "heldout:5:1"]
    assert indices(on.next_batch(0)) == [0, 1]
    (result,) = on.evaluation.take_finished()
    assert (result.step, result.reward, len(result.groups)) == (5, 0.5, 2)
    assert on.evaluation.take_finished() == []
    assert on.pool.consumed == 2


def test_an_answer_to_a_closed_round_is_done_but_not_counted(bench: Callable[..., Bench]) -> None:
    on = bench(delivery(1, make_group(rewards=(1.0,), lease=Lease("heldout", 0, 3))))
    on.batcher.serve_evaluation()
    assert on.source.committed == {"p": 1}
    assert on.pool.consumed == 0
    assert on.evaluation.take_finished() == []


def test_no_data_is_an_error_with_the_key_to_change(bench: Callable[..., Bench]) -> None:
    impatient = CONFIG.model_copy(update={"learner": CONFIG.learner.model_copy(update={"data_timeout_s": 0.05})})
    with pytest.raises(NoGroupsError, match=r"learner.data_timeout_s = 0.05 s, and .* needs 2 more"):
        bench(config=impatient).next_batch(0)


def test_what_the_thread_died_of_reaches_the_loop_and_is_not_forgiven(bench: Callable[..., Bench]) -> None:
    on = bench(BrokerError("gap"), delivery(1, make_group(0)))
    for _ in range(2):
        with pytest.raises(BrokerError, match="gap"):
            on.next_batch(0)
        on.ingest.go_on()  # Redis agrees again, but that was not the trouble


def test_a_payload_of_another_lease_is_quarantined(bench: Callable[..., Bench]) -> None:
    on = bench(
        delivery(1, make_group(0), payload=encode_group(make_group(7))),
        delivery(2, make_group(1)),
        delivery(3, make_group(2)),
    )
    batch = on.next_batch(0)
    assert batch is not None
    assert batch.totals["malformed"] == 1
    assert "its entry train:0:0" in on.source.quarantined[0]


def test_filtering_can_be_turned_off(bench: Callable[..., Bench]) -> None:
    keep = CONFIG.model_copy(update={"rollout": CONFIG.rollout.model_copy(update={"filter_zero_variance": False})})
    on = bench(*(delivery(i + 1, make_group(i, rewards=(1.0, 1.0))) for i in range(2)), config=keep)
    assert indices(on.next_batch(0)) == [0, 1]


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
    bench: Callable[..., Bench], group: RolloutGroup, reason: str
) -> None:
    on = bench(delivery(1, group), delivery(2, make_group(1)), delivery(3, make_group(2)))
    batch = on.next_batch(0)
    assert batch is not None
    assert len(batch.groups) == 2
    assert reason in on.source.quarantined[0]


def test_an_evaluation_goes_on_without_an_unreadable_answer(bench: Callable[..., Bench]) -> None:
    good, bad = (make_group(rewards=(1.0,), lease=Lease("heldout", i, 5)) for i in range(2))
    on = bench(delivery(1, bad, payload=b"garbage"), delivery(2, good))
    on.evaluation.ask(5)
    while on.evaluation.num_missing:
        on.batcher.serve_evaluation()
    (result,) = on.evaluation.take_finished()
    assert (result.reward, len(result.groups)) == (1.0, 1)


def test_what_was_not_answered_is_asked_again() -> None:
    source = ListSource()
    evaluation = Evaluation(source, CONFIG.evaluation, num_rows=10)  # type: ignore[arg-type]
    evaluation.open(5)
    evaluation.add(make_group(rewards=(1.0,), lease=Lease("heldout", 0, 5)))
    assert (evaluation.open_rounds(), source.asked) == ((5,), [])
    evaluation.ask_again()
    assert source.asked == [Lease("heldout", 1, 5)]


def test_a_round_answered_before_a_restart_is_not_asked_again() -> None:
    source = ListSource()
    evaluation = Evaluation(source, CONFIG.evaluation, num_rows=10, answered={5})  # type: ignore[arg-type]
    assert not evaluation.is_due(5)
    assert evaluation.is_due(10)


def test_rewards_that_are_always_equal_end_the_run_with_advice(bench: Callable[..., Bench]) -> None:
    on = bench(*(delivery(i + 1, make_group(i, rewards=(0.0, 0.0))) for i in range(120)))
    with pytest.raises(TaskError, match=r"100 groups for one step.*task.rewards"):
        on.next_batch(0)


def test_groups_that_are_stale_are_waited_out_and_others_are_served_meanwhile(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Actors that miss the newest weights send them without a pause: the learner has to find out what is gone."""
    monkeypatch.setattr("learner.batcher._ATTENDED_S", 0.0)
    monkeypatch.setattr("learner.batcher._IDLE_S", 3600.0)
    stale = [delivery(i + 1, make_group(i, rewards=(0.0, float(i % 9 == 0)))) for i in range(120)]
    patient = CONFIG.model_copy(update={"learner": CONFIG.learner.model_copy(update={"data_timeout_s": 60.0})})
    on = bench(*stale, *(delivery(i + 1, make_group(i, version=50)) for i in (120, 121)), config=patient)
    calls: list[int] = []
    batch = on.next_batch(50, while_idle=lambda: calls.append(on.pool.totals.get("stale", 0)))
    assert indices(batch) == [120, 121]
    assert set(calls) >= set(range(1, 15)), "of 120 groups every ninth had a signal, and was stale"


def test_stale_groups_alone_are_no_groups(bench: Callable[..., Bench]) -> None:
    config = CONFIG.model_copy(update={"learner": CONFIG.learner.model_copy(update={"data_timeout_s": 2.0})})
    on = bench(*(delivery(i + 1, make_group(i)) for i in range(3)), config=config)
    assert on.source.empty.wait(30.0)
    with pytest.raises(NoGroupsError, match=r"3 were stale\).*does it follow the weights"):
        on.next_batch(50)


def test_what_ended_an_earlier_life_does_not_end_the_next_one(bench: Callable[..., Bench]) -> None:
    """Or --resume would be in vain, whatever was mended."""
    useless = (delivery(i + 1, make_group(i, rewards=(0.0, 0.0))) for i in range(120))
    on = bench(*useless, *(delivery(i + 1, make_group(i)) for i in (120, 121)))
    arrivals = []
    while len(arrivals) < 120:
        arrivals += [arrival] if (arrival := on.ingest.take(timeout_s=5.0)) is not None else []
    on.batcher.resume(arrivals)
    assert indices(on.next_batch(0)) == [120, 121]
