"""The wire: round trips, and every kind of bad bytes refused with a WireFormatError."""

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lambdapo_async import wire
from lambdapo_async.errors import WireFormatError
from lambdapo_async.rollout import Lease, Rollout, RolloutGroup, VersionSpan
from lambdapo_async.wire import decode_group, encode_group
from tests.groups import MAX_VERSION, VOCAB_SIZE, groups, make_group, make_rollout


def decode(payload: bytes) -> RolloutGroup:
    return decode_group(payload, vocab_size=VOCAB_SIZE, max_version=MAX_VERSION)


def assert_same(left: RolloutGroup, right: RolloutGroup) -> None:
    assert (left.lease, left.actor_id, left.timing) == (right.lease, right.actor_id, right.timing)
    np.testing.assert_array_equal(left.prompt_ids, right.prompt_ids)
    assert len(left.rollouts) == len(right.rollouts)
    for a, b in zip(left.rollouts, right.rollouts, strict=True):
        np.testing.assert_array_equal(a.completion_ids, b.completion_ids)
        np.testing.assert_array_equal(a.behavior_logprobs, b.behavior_logprobs)
        assert (a.version_spans, a.finish_reason, a.text) == (b.version_spans, b.finish_reason, b.text)
        assert (a.reward, dict(a.reward_parts)) == (b.reward, dict(b.reward_parts))


@given(groups())
def test_round_trip(group: RolloutGroup) -> None:
    assert_same(decode(encode_group(group)), group)


@given(groups(), st.data())
@settings(max_examples=200)
def test_truncated_bytes_are_refused(group: RolloutGroup, data: st.DataObject) -> None:
    payload = encode_group(group)
    cut = data.draw(st.integers(0, len(payload) - 1))
    with pytest.raises(WireFormatError):
        decode(payload[:cut])


@given(st.binary(max_size=400))
def test_garbage_is_refused(payload: bytes) -> None:
    with pytest.raises(WireFormatError):
        decode(payload)


@given(groups(), st.data())
@settings(max_examples=300)
def test_a_flipped_byte_is_refused_or_gives_a_valid_group(group: RolloutGroup, data: st.DataObject) -> None:
    payload = bytearray(encode_group(group))
    at = data.draw(st.integers(0, len(payload) - 1))
    payload[at] ^= data.draw(st.integers(1, 255))
    try:
        decoded = decode(bytes(payload))
    except WireFormatError:
        return
    for rollout in decoded.rollouts:
        assert rollout.completion_ids.max(initial=0) < VOCAB_SIZE
        assert np.isfinite(rollout.behavior_logprobs).all()
    assert decoded.max_version <= MAX_VERSION


def tampered(**changes: object) -> bytes:
    message = msgpack.unpackb(encode_group(make_group()))
    message.update(changes)
    return msgpack.packb(message)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"schema_version": 2}, "schema 2, this process reads schema 1"),
        ({"unknown": 1}, "unknown"),
        ({"lease": "train:0"}, "no such lease"),
        ({"lease": "test:0:1"}, "no such lease"),
        ({"lengths": b""}, "0 rollouts"),
        ({"lengths": b"\x05\x00\x00\x00" * 3}, "3 rollouts with 2 texts"),
        ({"lengths": b"\xff\xff\xff\xff" * 2}, "completion_ids has 40 bytes"),
        ({"completion_ids": np.full(10, VOCAB_SIZE, "<i4").tobytes()}, "vocabulary has 1000"),
        ({"completion_ids": np.full(10, -1, "<i4").tobytes()}, "vocabulary has 1000"),
        ({"behavior_logprobs": np.full(10, np.nan, "<f4").tobytes()}, "finite and <= 0"),
        ({"behavior_logprobs": np.full(10, 0.1, "<f4").tobytes()}, "finite and <= 0"),
        ({"span_versions": np.full(2, MAX_VERSION + 1, "<i8").tobytes()}, "newer than the newest"),
        ({"span_tokens": np.full(2, 4, "<u4").tobytes()}, "spans cover 4 of 5"),
        ({"finish_reasons": b"\x00\x09"}, "finish reason 9"),
        ({"rewards": np.full(2, np.inf, "<f8").tobytes()}, "rewards must be finite"),
        ({"reward_parts": {"verifiable": b"123"}}, "reward part 'verifiable'"),
        ({"prompt_ids": b""}, "prompt ids"),
        ({"texts": ["a", 3]}, "texts"),
        ({"timing": [1.0]}, "timing"),
        ({"actor_id": msgpack.Timestamp(1)}, "not msgpack"),
    ],
)
def test_a_wrong_field_is_named(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(WireFormatError, match=complaint):
        decode(tampered(**changes))


def test_bombs_cost_nothing() -> None:
    deep = b"\x91" * 100_000
    huge_array = b"\xdd\xff\xff\xff\xff"
    huge_map = b"\xdf\xff\xff\xff\xff"
    huge_string = b"\xdb\xff\xff\xff\xff"
    for bomb in (deep, huge_array, huge_map, huge_string):
        with pytest.raises(WireFormatError):
            decode(bomb)


def test_oversized_payload_is_refused_unread() -> None:
    with pytest.raises(WireFormatError, match="exceed the limit"):
        decode(bytes(wire.MAX_PAYLOAD_BYTES + 1))


def test_too_many_rollouts_are_refused_when_encoding() -> None:
    group = make_group(rewards=(0.0,) * (wire.MAX_ROLLOUTS + 1), num_tokens=1)
    with pytest.raises(WireFormatError, match="4097 rollouts"):
        encode_group(group)


def test_records_check_themselves() -> None:
    with pytest.raises(WireFormatError, match="one length"):
        Rollout(
            completion_ids=np.arange(3),
            behavior_logprobs=np.zeros(2),
            version_spans=(VersionSpan(0, 3),),
            finish_reason="stop",
            text="",
            reward=0.0,
        )
    with pytest.raises(WireFormatError, match="holds no rollout"):
        make_group(rewards=())
    with pytest.raises(WireFormatError, match="no such lease"):
        Lease("train", -1)


def test_columns_are_read_only_and_versions_expand() -> None:
    rollout = Rollout(
        completion_ids=np.arange(3),
        behavior_logprobs=np.zeros(3),
        version_spans=(VersionSpan(4, 1), VersionSpan(5, 2)),
        finish_reason="length",
        text="",
        reward=0.0,
    )
    assert rollout.token_versions.tolist() == [4, 5, 5]
    with pytest.raises(ValueError, match="read-only"):
        rollout.completion_ids[0] = 7
    assert make_rollout(0).num_tokens == 0
