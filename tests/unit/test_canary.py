"""The canary: its record, what counts as the same policy, and where it is kept."""

import contextlib
import itertools
from collections.abc import Iterator

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lambdapo_async.broker.client import Broker
from lambdapo_async.broker.ownership import Ownership
from lambdapo_async.errors import FencedError, WeightsError
from lambdapo_async.keys import RunKeys
from lambdapo_async.weights.canary import TOLERANCES, Canary, CanaryError, ModelIdentity, compare
from lambdapo_async.weights.canary_store import CanaryStore, RedisCanaryStore
from tests.canaries import CHECKSUM, FILES, IDENTITY, ROWS, canary_of
from tests.fakes_canary import FakeCanaryStore


def scores(*, off_by: float = 0.0) -> list[np.ndarray]:
    return [np.array(row.logprobs, np.float32) - np.float32(off_by) for row in ROWS]


def test_a_canary_survives_its_record() -> None:
    assert Canary.from_bytes(canary_of().to_bytes()) == canary_of()


scalars = st.none() | st.integers(-(2**63), 2**64 - 1) | st.text()


@given(st.binary(max_size=60) | st.recursive(scalars, st.lists).map(msgpack.packb))
@settings(max_examples=50)
def test_any_other_record_is_refused(record: bytes) -> None:
    with pytest.raises(WeightsError):
        Canary.from_bytes(record)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": []},
        {"checksum": "xxh3_128:0"},
        {"version": -1},
        {"more": 1},
        {"rows": [{"prompt_ids": [1], "completion_ids": [2, 3], "logprobs": [-1.0]}]},
        {"rows": [{"prompt_ids": [1], "completion_ids": [2], "logprobs": [float("nan")]}]},
        {"rows": [{"prompt_ids": [1], "completion_ids": [2], "logprobs": [0.1]}]},
        {"rows": [{"prompt_ids": [], "completion_ids": [2], "logprobs": [-1.0]}]},
    ],
)
def test_what_cannot_be_a_canary_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(WeightsError):
        Canary.from_bytes(msgpack.packb({**canary_of().model_dump(), **change}))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_another_model_or_tokenizer_is_another_identity(name: str) -> None:
    other = ModelIdentity.of({**FILES, name: b"other"})
    with pytest.raises(CanaryError, match="config" if name == "config.json" else "tokenizer"):
        canary_of().check_identity(other, checksum=CHECKSUM)


def test_sampling_defaults_are_not_part_of_it_and_other_weights_are() -> None:
    canary_of().check_identity(ModelIdentity.of({**FILES, "generation_config.json": b"x"}), checksum=CHECKSUM)
    with pytest.raises(CanaryError, match="weights"):
        canary_of().check_identity(IDENTITY, checksum=CHECKSUM[:-1] + "1")


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_every_type_has_its_own_tolerance(dtype: str) -> None:
    mean = TOLERANCES[dtype].mean
    assert compare(canary_of(), scores(off_by=0.9 * mean), dtype=dtype).is_passed
    verdict = compare(canary_of(), scores(off_by=1.1 * mean), dtype=dtype)
    assert verdict.mean_gap == pytest.approx(1.1 * mean, rel=1e-3)
    with pytest.raises(CanaryError, match="does not sample from the learner's policy"):
        verdict.check()


def test_one_token_far_off_fails_though_the_mean_is_small() -> None:
    scored = scores()
    scored[1][0] -= 0.15
    verdict = compare(canary_of(), scored, dtype="float16")
    assert (verdict.max_gap, verdict.is_passed) == (pytest.approx(0.15), False)


def test_nan_never_passes() -> None:
    scored = scores()
    scored[0][1] = np.nan
    assert not compare(canary_of(), scored, dtype="fp8").is_passed


def test_the_looser_of_both_types_counts() -> None:
    assert compare(canary_of(dtype="bfloat16"), scores(off_by=0.04), dtype="float32").is_passed


def test_scores_that_cannot_be_compared() -> None:
    with pytest.raises(WeightsError, match="no tolerance"):
        compare(canary_of(), scores(), dtype="fp3")
    with pytest.raises(WeightsError, match="scored"):
        compare(canary_of(), scores()[:1], dtype="float32")


@pytest.fixture(params=["fake", "redis"])
def store(request: pytest.FixtureRequest) -> Iterator[CanaryStore]:
    if request.param == "fake":
        yield FakeCanaryStore()
        return
    with contextlib.closing(Broker(request.getfixturevalue("redis_url"), timeout_s=10)) as broker:
        keys = RunKeys(f"canary-{next(_numbers)}")
        Ownership(broker, keys).take_over(1, {})
        yield RedisCanaryStore(broker, keys)


_numbers = itertools.count()


def test_a_record_answers_the_wish(store: CanaryStore) -> None:
    assert (store.canary(), store.is_canary_asked()) == (None, False)
    store.ask_canary()
    store.ask_canary()
    assert store.is_canary_asked()
    store.put_canary(b"record", fence=1)
    assert (store.canary(), store.is_canary_asked()) == (b"record", False)


def test_a_learner_that_was_replaced_publishes_no_canary(store: CanaryStore) -> None:
    store.put_canary(b"record", fence=1)
    with pytest.raises(FencedError):
        store.put_canary(b"late", fence=0)
    assert store.canary() == b"record"
