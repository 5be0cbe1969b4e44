"""Rollout groups as bytes: a msgpack map whose columns are raw little-endian arrays.

Raw columns make encoding and decoding some 50 times cheaper than lists of numbers. Nothing in a message is
executed, and nothing is allocated before its size was checked: the payload's bytes, every column against the
lengths, every id against the vocabulary. G = rollouts, C = completion tokens, N = sum of C.
"""

from collections.abc import Mapping
from typing import Annotated, NoReturn, TypeVar

import msgpack
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lambdapo_async.errors import WireFormatError
from lambdapo_async.rollout import FINISH_REASONS, Lease, Rollout, RolloutGroup, Timing, VersionSpan

WIRE_SCHEMA = 1
GROUP, PARTIAL = "group", "partial group"
"""What a seal around a message says it is for."""
MAX_PAYLOAD_BYTES = 256 * 1024**2
MAX_ROLLOUTS = 4096
MAX_REWARD_PARTS = 64
MAX_TEXT_BYTES = 4 * 1024**2

_COUNT: np.dtype[np.uint32] = np.dtype("<u4")
_TOKEN: np.dtype[np.int32] = np.dtype("<i4")
_LOGPROB: np.dtype[np.float32] = np.dtype("<f4")
_VERSION: np.dtype[np.int64] = np.dtype("<i8")
_REWARD: np.dtype[np.float64] = np.dtype("<f8")
_REASON: np.dtype[np.uint8] = np.dtype("u1")

Scalar = TypeVar("Scalar", bound=np.generic)


class _Envelope(BaseModel):
    """The message as it stands on the wire."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    schema_version: int
    lease: Annotated[str, Field(max_length=64)]
    actor_id: Annotated[str, Field(max_length=128)]
    timing: Annotated[list[float], Field(min_length=3, max_length=3)]
    prompt_ids: bytes
    lengths: bytes
    """u4 [G] C of each rollout"""
    completion_ids: bytes
    """i4 [N]"""
    behavior_logprobs: bytes
    """f4 [N]"""
    span_counts: bytes
    """u4 [G] version spans of each rollout"""
    span_versions: bytes
    """i8 [sum of span_counts]"""
    span_tokens: bytes
    """u4 [sum of span_counts]"""
    finish_reasons: bytes
    """u1 [G] index into FINISH_REASONS"""
    texts: Annotated[list[str], Field(max_length=MAX_ROLLOUTS)]
    rewards: bytes
    """f8 [G]"""
    reward_parts: Annotated[dict[str, bytes], Field(max_length=MAX_REWARD_PARTS)]
    """name -> f8 [G], NaN where a rollout lacks the part"""


def encode_group(group: RolloutGroup) -> bytes:
    """Serialise ``group``; ``WireFormatError`` when it exceeds a limit of the wire."""
    rollouts = group.rollouts
    spans = [span for rollout in rollouts for span in rollout.version_spans]
    part_names = sorted({name for rollout in rollouts for name in rollout.reward_parts})
    payload: bytes = msgpack.packb(
        {
            "schema_version": WIRE_SCHEMA,
            "lease": group.lease.id,
            "actor_id": group.actor_id,
            "timing": [group.timing.started_at, group.timing.generation_s, group.timing.scoring_s],
            "prompt_ids": group.prompt_ids.astype(_TOKEN).tobytes(),
            "lengths": _column([rollout.num_tokens for rollout in rollouts], _COUNT),
            "completion_ids": np.concatenate([r.completion_ids for r in rollouts]).astype(_TOKEN).tobytes(),
            "behavior_logprobs": np.concatenate([r.behavior_logprobs for r in rollouts]).astype(_LOGPROB).tobytes(),
            "span_counts": _column([len(rollout.version_spans) for rollout in rollouts], _COUNT),
            "span_versions": _column([span.policy_version for span in spans], _VERSION),
            "span_tokens": _column([span.num_tokens for span in spans], _COUNT),
            "finish_reasons": bytes(FINISH_REASONS.index(rollout.finish_reason) for rollout in rollouts),
            "texts": [rollout.text for rollout in rollouts],
            "rewards": _column([rollout.reward for rollout in rollouts], _REWARD),
            "reward_parts": {
                name: _column([rollout.reward_parts.get(name, np.nan) for rollout in rollouts], _REWARD)
                for name in part_names
            },
        }
    )
    if len(payload) > MAX_PAYLOAD_BYTES or len(rollouts) > MAX_ROLLOUTS or len(part_names) > MAX_REWARD_PARTS:
        raise WireFormatError(
            f"group {group.lease.id} is too large for the wire: {len(payload)} bytes (at most {MAX_PAYLOAD_BYTES}), "
            f"{len(rollouts)} rollouts ({MAX_ROLLOUTS}), {len(part_names)} reward parts ({MAX_REWARD_PARTS})"
        )
    return payload


def decode_group(payload: bytes, *, vocab_size: int, max_version: int) -> RolloutGroup:
    """Parse and validate one message.

    Args:
        payload: what :func:`encode_group` produced, or anything else.
        vocab_size: every token id must be below it.
        max_version: newest version that exists; a group claiming a newer one is not ours.

    Raises:
        WireFormatError: says what is wrong; the payload must not be used.
    """
    envelope = _unpack(payload)
    lengths = _array(envelope.lengths, _COUNT, "lengths")
    num_rollouts, num_tokens = len(lengths), int(lengths.sum(dtype=np.int64))
    if not 1 <= num_rollouts <= MAX_ROLLOUTS or len(envelope.texts) != num_rollouts:
        raise WireFormatError(f"{num_rollouts} rollouts with {len(envelope.texts)} texts; 1 to {MAX_ROLLOUTS} fit")
    prompt_ids = _token_ids(envelope.prompt_ids, "prompt_ids", vocab_size)
    completion_ids = _token_ids(envelope.completion_ids, "completion_ids", vocab_size, num_tokens)
    logprobs = _array(envelope.behavior_logprobs, _LOGPROB, "behavior_logprobs", num_tokens)
    rewards = _array(envelope.rewards, _REWARD, "rewards", num_rollouts)
    parts = {
        name: _array(column, _REWARD, f"reward part {name!r:.80}", num_rollouts)
        for name, column in envelope.reward_parts.items()
    }
    spans = _spans(envelope, num_rollouts, max_version)
    reasons = _array(envelope.finish_reasons, _REASON, "finish_reasons", num_rollouts)
    if reasons.max() >= len(FINISH_REASONS):
        raise WireFormatError(f"finish reason {reasons.max()} of {len(FINISH_REASONS)}")
    ends = np.cumsum(lengths, dtype=np.int64)
    rollouts = tuple(
        Rollout(
            completion_ids=completion_ids[end - length : end],
            behavior_logprobs=logprobs[end - length : end],
            version_spans=spans[i],
            finish_reason=FINISH_REASONS[reasons[i]],
            text=envelope.texts[i],
            reward=float(rewards[i]),
            reward_parts=_parts_of(parts, i),
        )
        for i, (end, length) in enumerate(zip(ends, lengths, strict=True))
    )
    started_at, generation_s, scoring_s = envelope.timing
    return RolloutGroup(
        lease=Lease.from_id(envelope.lease),
        prompt_ids=prompt_ids,
        rollouts=rollouts,
        actor_id=envelope.actor_id,
        timing=Timing(started_at=started_at, generation_s=generation_s, scoring_s=scoring_s),
    )


def _unpack(payload: bytes) -> _Envelope:
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise WireFormatError(f"{len(payload)} bytes exceed the limit of {MAX_PAYLOAD_BYTES}")
    try:
        message = msgpack.unpackb(
            payload,
            strict_map_key=True,
            ext_hook=_refuse_extension,
            max_str_len=MAX_TEXT_BYTES,
            max_bin_len=MAX_PAYLOAD_BYTES,
            max_array_len=MAX_ROLLOUTS,
            max_map_len=256,
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException) as error:
        raise WireFormatError(f"{len(payload)} bytes that are not msgpack: {error}") from error
    found = message.get("schema_version") if isinstance(message, dict) else None
    if found != WIRE_SCHEMA:
        raise WireFormatError(f"schema {found!r:.40}, this process reads schema {WIRE_SCHEMA}")
    try:
        return _Envelope.model_validate(message)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise WireFormatError(f"field {'.'.join(map(str, first['loc']))!r:.80}: {first['msg']}") from error


def _refuse_extension(code: int, _: bytes) -> NoReturn:
    raise ValueError(f"extension type {code}")


def _column(values: list[int] | list[float], dtype: np.dtype[np.generic]) -> bytes:
    return np.array(values, dtype).tobytes()


def _array(column: bytes, dtype: np.dtype[Scalar], name: str, length: int | None = None) -> NDArray[Scalar]:
    if len(column) % dtype.itemsize or (length is not None and len(column) != length * dtype.itemsize):
        wanted = f"{length} x " if length is not None else "a multiple of "
        raise WireFormatError(f"{name} has {len(column)} bytes, expected {wanted}{dtype.itemsize}")
    return np.frombuffer(column, dtype)


def _token_ids(column: bytes, name: str, vocab_size: int, length: int | None = None) -> NDArray[np.int32]:
    ids = _array(column, _TOKEN, name, length)
    if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
        raise WireFormatError(f"{name} holds ids {ids.min()} to {ids.max()}, the vocabulary has {vocab_size}")
    return ids


def _spans(envelope: _Envelope, num_rollouts: int, max_version: int) -> list[tuple[VersionSpan, ...]]:
    counts = _array(envelope.span_counts, _COUNT, "span_counts", num_rollouts)
    total = int(counts.sum(dtype=np.int64))
    versions = _array(envelope.span_versions, _VERSION, "span_versions", total)
    tokens = _array(envelope.span_tokens, _COUNT, "span_tokens", total)
    if total and versions.max() > max_version:
        raise WireFormatError(f"policy version {versions.max()} is newer than the newest, {max_version}")
    ends = np.cumsum(counts, dtype=np.int64)
    return [
        tuple(VersionSpan(int(versions[at]), int(tokens[at])) for at in range(end - count, end))
        for end, count in zip(ends, counts, strict=True)
    ]


def _parts_of(parts: Mapping[str, NDArray[np.float64]], index: int) -> dict[str, float]:
    return {name: float(column[index]) for name, column in parts.items() if not np.isnan(column[index])}
