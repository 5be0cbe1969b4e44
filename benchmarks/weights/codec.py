"""Bytes per parameter and speed of every encoding, on one thread."""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

import numpy as np

from benchmarks.weights.encodings import Encoding, all_encodings, pairs
from lambdapo_async.weights.state import State
from lambdapo_async.weights.tensor_file import BitTensor

R = TypeVar("R")


@dataclass(frozen=True)
class CodecResult:
    """One encoding of one update."""

    lr: float
    changed_share: float
    encoding: str
    bytes_per_parameter: float
    times_smaller: float
    """Than plain bfloat16."""
    encode_mb_per_s: float
    """MB of the full model per second of processor time, in the fastest repeat: others may use the machine, too."""
    encode_mb_per_s_median: float
    decode_mb_per_s: float
    """Decode and apply to a mirror."""
    decode_mb_per_s_median: float


def measure_codec(
    updates: Mapping[float, tuple[State, State]], *, copies: int, repeats: int, pool: Executor
) -> Iterator[CodecResult]:
    """Sizes at every learning rate; speeds with every tensor ``copies`` times as long.

    So tensors have the size of larger models' and do not fit in the cache; ours and the full file include the state's
    checksum, the peers have none.
    """
    for lr, (old, new) in updates.items():
        long_old, long_new = longer(old, copies), longer(new, copies)
        long_old.checksum(pool)  # as for a learner and an actor, who have it from the version before
        changed = sum(np.count_nonzero(before != after.bits) for before, after in pairs(old, new))
        for encoding in all_encodings(pool):
            size = len(encoding.encode(old, new))
            encode_s, decode_s = zip(*(round_trip(encoding, long_old, long_new) for _ in range(repeats)), strict=True)
            megabytes = long_new.num_bytes / 1e6
            yield CodecResult(
                lr=lr,
                changed_share=changed / new.numel,
                encoding=encoding.name,
                bytes_per_parameter=size / new.numel,
                times_smaller=new.num_bytes / size,
                encode_mb_per_s=megabytes / min(encode_s),
                encode_mb_per_s_median=megabytes / median(encode_s),
                decode_mb_per_s=megabytes / min(decode_s),
                decode_mb_per_s_median=megabytes / median(decode_s),
            )


def longer(state: State, copies: int) -> State:
    """Every tensor ``copies`` times in a row: for speed only, since equal rows compress too well."""
    return State(
        state.version,
        {
            name: BitTensor(tensor.dtype, (copies, *tensor.shape), np.tile(tensor.bits, copies))
            for name, tensor in state.tensors.items()
        },
    )


def round_trip(encoding: Encoding, old: State, new: State) -> tuple[float, float]:
    """Seconds to encode and to decode; the result must be ``new`` bit by bit."""
    fresh, mirror = State(new.version, new.tensors), old.copy()  # its digests are part of the work
    encode_s, payload = timed(lambda: encoding.encode(old, fresh))
    decode_s, mirror = timed(lambda: encoding.decode(payload, mirror))
    check_same(encoding, mirror, new)
    return encode_s, decode_s


def check_same(encoding: Encoding, found: State, expected: State) -> None:
    """End the benchmark unless the bits are the same: a fast wrong codec is worth nothing."""
    if any(not np.array_equal(each, right.bits) for each, right in pairs(found, expected)):
        raise SystemExit(f"{encoding.name} is not lossless")


def timed(work: Callable[[], R]) -> tuple[float, R]:
    started = time.process_time()
    result = work()
    return time.process_time() - started, result
