"""Signed messages: whatever is changed is refused before it is looked at, and a key on one side alone is told."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lambdapo_async.config.load import load_config
from lambdapo_async.errors import ConfigError, WeightsError, WireFormatError
from lambdapo_async.seal import SEAL_BYTES, Seal, SealError
from lambdapo_async.weights.catch_up import Available
from lambdapo_async.weights.manifest import Manifest, NewFile
from lambdapo_async.wire import GROUP, decode_group, encode_group
from tests.groups import MAX_VERSION, VOCAB_SIZE, groups

KEY = "sixteen letters!"
ON, OFF = Seal(KEY, run_id="run"), Seal(None, run_id="run")
MESSAGES = st.binary(max_size=200)


@given(MESSAGES, st.text(max_size=20))
def test_what_was_closed_opens(message: bytes, purpose: str) -> None:
    sealed = ON.close(message, purpose=purpose)
    assert len(sealed) == len(message) + SEAL_BYTES
    assert ON.open(sealed, purpose=purpose) == message
    assert Seal(KEY, run_id="run").open(sealed, purpose=purpose) == message


@given(MESSAGES, st.data())
def test_any_flipped_bit_is_refused(message: bytes, data: st.DataObject) -> None:
    sealed = bytearray(ON.close(message, purpose=GROUP))
    sealed[data.draw(st.integers(0, len(sealed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(SealError):
        ON.open(bytes(sealed), purpose=GROUP)


@given(MESSAGES, st.data())
def test_any_cut_or_grown_message_is_refused(message: bytes, data: st.DataObject) -> None:
    sealed = ON.close(message, purpose=GROUP)
    for wrong in (sealed[: data.draw(st.integers(0, len(sealed) - 1))], sealed + data.draw(st.binary(min_size=1))):
        with pytest.raises(SealError):
            ON.open(wrong, purpose=GROUP)


@given(MESSAGES)
def test_a_message_counts_for_its_run_its_purpose_and_its_key_alone(message: bytes) -> None:
    sealed = ON.close(message, purpose=GROUP)
    for other, purpose in ((Seal(KEY, run_id="ru"), "n" + GROUP), (Seal(KEY + "!", run_id="run"), GROUP), (ON, "x")):
        with pytest.raises(SealError, match="signature is wrong"):
            other.open(sealed, purpose=purpose)


def test_a_key_on_one_side_alone_is_told() -> None:
    with pytest.raises(SealError, match="has no key: set LAMBDAPO_HMAC_KEY"):
        OFF.open(ON.close(b"x", purpose=GROUP), purpose=GROUP)
    with pytest.raises(SealError, match=r"not signed.*has no LAMBDAPO_HMAC_KEY"):
        ON.open(OFF.close(b"x", purpose=GROUP), purpose=GROUP)
    assert OFF.open(OFF.close(b"x", purpose=GROUP), purpose=GROUP) == b"x"


@given(groups(), st.data())
def test_a_group_that_was_changed_is_never_decoded(group, data: st.DataObject) -> None:
    sealed = bytearray(ON.close(encode_group(group), purpose=GROUP))
    sealed[data.draw(st.integers(0, len(sealed) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(WireFormatError):
        decode_group(ON.open(bytes(sealed), purpose=GROUP), vocab_size=VOCAB_SIZE, max_version=MAX_VERSION)


def manifest_of(payload: bytes, seal: Seal) -> bytes:
    file = NewFile(Available(version=3, num_bytes=len(payload)), payload)
    return Manifest.in_chunks(file).signed_for(file, seal).pack(seal)


@given(st.data())
def test_a_manifest_that_was_changed_is_a_weights_error(data: st.DataObject) -> None:
    packed = bytearray(manifest_of(b"weights", ON))
    assert Manifest.unpack(bytes(packed), name="3.full", seal=ON).check_whole(b"weights") == b"weights"
    packed[data.draw(st.integers(0, len(packed) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(WeightsError, match=r"3\.full cannot be trusted"):
        Manifest.unpack(bytes(packed), name="3.full", seal=ON)


def test_a_signed_manifest_vouches_for_its_file_beyond_its_checksum() -> None:
    signed = Manifest.unpack(manifest_of(b"weights", ON), name="3.full", seal=ON)
    forged = b"forgery"
    with_their_checksum = signed.model_copy(
        update={"digest": Manifest.unpack(manifest_of(forged, OFF), name="3.full", seal=OFF).digest}
    )  # as if xxh3 had been broken
    with pytest.raises(WeightsError, match="not what was signed"):
        with_their_checksum.check_whole(forged)
    unsigned_digest = ON.close(OFF.open(manifest_of(b"weights", OFF), purpose="x"), purpose="weights manifest")
    with pytest.raises(WeightsError, match="lacks the digest"):
        Manifest.unpack(unsigned_digest, name="3.full", seal=ON)
    for one, other in ((ON, OFF), (OFF, ON)):
        with pytest.raises(WeightsError, match="LAMBDAPO_HMAC_KEY"):
            Manifest.unpack(manifest_of(b"weights", one), name="3.full", seal=other)


def test_the_key_comes_from_the_environment_and_goes_nowhere(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[model]\npath = "m"\n[task]\nkind = "arithmetic"\n')
    config = load_config(path, environ={"LAMBDAPO_HMAC_KEY": KEY})
    assert config.broker.hmac_key is not None
    assert config.broker.hmac_key.get_secret_value() == KEY
    assert load_config(path, environ={}).broker.hmac_key is None
    with caplog.at_level(logging.DEBUG):
        logging.getLogger().info("%r %s %s", config, config.published(), ON)
    assert KEY not in caplog.text + config.model_dump_json()
    assert "hmac_key" not in str(config.published())


@pytest.mark.parametrize("key", ["short", "1234567890123456789"])
def test_a_bad_key_is_refused_and_not_shown(tmp_path, key: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[model]\npath = "m"\n[task]\nkind = "arithmetic"\n')
    with pytest.raises(ConfigError, match=r"broker\.hmac_key = \*\*\*") as refused:
        load_config(path, [f"broker.hmac_key={key}"], environ={})
    assert key not in str(refused.value)
