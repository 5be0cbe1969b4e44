"""Readers of foreign bytes, on bytes that hypothesis makes and on good ones that were tampered with."""

import random

import msgpack
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lambdapo_async.broker.interface import Delivery
from lambdapo_async.broker.ownership import Ownership
from lambdapo_async.broker.rollout_sink import RedisRolloutSink
from lambdapo_async.broker.run_store import RedisRunStore
from lambdapo_async.config.load import parse_published
from lambdapo_async.errors import BrokerError, RunNotFoundError, WeightsError
from lambdapo_async.journal.records import JournalError, decode_record
from lambdapo_async.weights.manifest import unpack_available
from tests.fuzz.broker_replies import DESCRIPTOR, KEYS, SEAL, AnsweringBroker
from tests.fuzz.mutation import Together, mutated
from tests.fuzz.targets import Target, targets

TARGETS = targets()
FEW = settings(max_examples=150, deadline=None)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_what_a_reader_is_made_for_is_read(target: Target) -> None:
    for seed in target.seeds:
        assert target.read(seed) is not None


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@given(content=st.binary(max_size=400))
@FEW
def test_any_bytes_are_read_or_refused(target: Target, content: bytes) -> None:
    target(content)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@given(number=st.integers(0, 2**32))
@FEW
def test_tampered_bytes_are_read_or_refused(target: Target, number: int) -> None:
    source = random.Random(number)
    target(mutated(source.choice(target.seeds), source))


@pytest.mark.parametrize(
    "fields",
    [
        ["group", "a.0", 1, 20, 0, 10, 0.5, ""],
        ["group", "a.0", "1", "train:0:1", 0, 10, 0.5, ""],
        ["step", 1, 0, 2, 3, []],
        ["step", 1, 0, 2, ["x"], []],
        ["step", 1, 0, 2, [1], [[2, 3]]],
        ["version", "1"],
        [],
        7,
    ],
)
def test_a_record_whose_fields_are_of_other_types_is_refused(fields: object) -> None:
    """Found by atheris: such a record came out whole, or as an AttributeError."""
    with pytest.raises(JournalError, match="a journal record"):
        decode_record(msgpack.packb(fields), b"")


@pytest.mark.parametrize("fields", [["3", 100, None, None], [3, 100, "2", None], [3, 100, None], 3])
def test_a_listed_weight_file_whose_fields_are_of_other_types_is_refused(fields: object) -> None:
    """Or sorting the list would fail in every actor."""
    with pytest.raises(WeightsError, match="is damaged"):
        unpack_available(msgpack.packb(fields))


def store_of(chunk: bytes) -> RedisRunStore:
    broker = AnsweringBroker([chunk])
    return RedisRunStore(broker, KEYS, Ownership(broker, KEYS), SEAL)


@pytest.mark.parametrize("rows", [7, [7], [{"prompt": 7}], [{7: "p"}], [[]], {"prompt": "p"}, "p"])
def test_rows_of_other_types_are_refused(rows: object) -> None:
    chunk = zstandard.ZstdCompressor().compress(msgpack.packb(rows))
    with pytest.raises(BrokerError, match="chunk 0 of the train rows is damaged"):
        store_of(chunk).row("train", 0)


def test_a_chunk_that_declares_more_than_memory_is_refused_before_it_is_allocated() -> None:
    """Found by reading: the library's own limit does not hold where a frame says how long it is."""
    frame = b"\x28\xb5\x2f\xfd\xe0" + (2**40).to_bytes(8, "little") + b"\x01\x00\x00"
    with pytest.raises(BrokerError, match="decompresses to 1099511627776 bytes, at most"):
        store_of(frame).row("train", 0)


def test_a_config_nested_too_deeply_is_refused() -> None:
    with pytest.raises(RunNotFoundError, match="the config of run r is damaged"):
        parse_published(b"[" * 1_000_000, run_id="r")


@pytest.mark.parametrize(
    "reply", [[b"HELLO", 1, 0, b"e"], [b"OK", 1, 0], [b"OK", b"x", 0, b"e"], [b"OK", None, 0, b"e"], 7]
)
def test_an_answer_to_an_offer_that_the_protocol_does_not_know_is_refused(reply: object) -> None:
    sink = RedisRolloutSink(AnsweringBroker([Together([True, reply])]), KEYS, SEAL)
    with pytest.raises(BrokerError, match=r"answered|is damaged"):
        sink.enqueue([Delivery(DESCRIPTOR, b"payload")], epoch="e")
