"""Weight files against what others send: bytes per parameter and speed, at real AdamW updates, in one run.

    python -m benchmarks.weights [--copies 8] [--repeats 3] [--warm-up 30]

A 14M Qwen3-style model learns to continue this repository's own documents, with float32 masters and AdamW. At each
learning rate the last step's bfloat16 weights are encoded from those before it. Speeds are MB of the full model per
second of processor time, on one thread, with every tensor ``copies`` times as long, so that tensors have the size of
larger models' and do not fit in the cache; ours and the full file include the state's checksum, the peers have none.
"""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import typer
import zstandard
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, set_seed

from benchmarks.machine import ROOT, describe_machine
from lambdapo_async.weights.delta_file import make_delta, read_delta, read_full, write_full
from lambdapo_async.weights.gaps import GapAbs, changed_positions, values_at
from lambdapo_async.weights.state import State
from lambdapo_async.weights.tensor_file import BitTensor, compress

RESULT = ROOT / "benchmarks" / "results" / "weights.json"
LEARNING_RATES = (1e-6, 5e-6, 1e-5, 1e-4)
VOCAB = 8192
RUN = "bench"
MAX_BYTES = 2**36

Bits = NDArray[np.integer]
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
    decode_mb_per_s: float
    """Decode and apply to a mirror."""


@dataclass(frozen=True)
class Encoding:
    """How a version is sent: ``encode`` from the states of two versions, ``decode`` into a mirror of the first."""

    name: str
    encode: Callable[[State, State], bytes]
    decode: Callable[[bytes, State], State]


def encodings(pool: ThreadPoolExecutor) -> list[Encoding]:
    def encode_delta(old: State, new: State) -> bytes:
        return make_delta(old, new, run_id=RUN, keyframe_version=0, pool=pool).to_bytes()

    def decode_delta(payload: bytes, mirror: State) -> State:
        file = read_delta(payload, max_bytes=MAX_BYTES)
        file.apply_to(mirror, run_id=RUN, version=file.metadata.version, pool=pool)
        return mirror

    def encode_full(_: State, new: State) -> bytes:
        return write_full(new, run_id=RUN, pool=pool)

    def decode_full(payload: bytes, mirror: State) -> State:
        return read_full(payload, run_id=RUN, version=mirror.version + 1, max_bytes=MAX_BYTES, pool=pool)

    return [
        Encoding("gap-step + zstd (ours)", encode_delta, decode_delta),
        Encoding("full safetensors", encode_full, decode_full),
        Encoding("full + zstd", lambda old, new: compress(encode_full(old, new)), decode_full),
        Encoding("int32 + bf16 (TRL, vLLM, verl)", encode_int32, decode_int32),
        Encoding("gap + bf16 + zstd (PULSE)", encode_values, decode_values),
        Encoding("XOR + zstd (slime, SkyRL)", encode_xor, decode_xor),
    ]


# Peers: no names, no checksums, the tensors in the order of the state


def pairs(old: State, new: State) -> Iterator[tuple[Bits, BitTensor]]:
    return ((old.tensors[name].bits, tensor) for name, tensor in new.tensors.items())


def encode_int32(old: State, new: State) -> bytes:
    parts = []
    for before, after in pairs(old, new):
        at = np.concatenate([*changed_positions(before, after.bits), np.empty(0, np.int64)])
        parts += [at.size.to_bytes(8, "little"), at.astype(np.int32).tobytes(), after.bits[at].tobytes()]
    return b"".join(parts)


def decode_int32(payload: bytes, mirror: State) -> State:
    start = 0
    for tensor in mirror.tensors.values():
        count = int.from_bytes(payload[start : start + 8], "little")
        at = np.frombuffer(payload, np.int32, count, start + 8)
        tensor.bits[at] = np.frombuffer(payload, np.uint16, count, start + 8 + 4 * count)
        start += 8 + 6 * count
    return mirror


def encode_values(old: State, new: State) -> bytes:
    parts = []
    for before, after in pairs(old, new):
        change = values_at(changed_positions(before, after.bits), after)
        if change is None:
            parts += [bytes(9)]
        else:
            count, width = change.gap.size.to_bytes(8, "little"), bytes([change.gap.itemsize])
            parts += [count, width, change.gap.tobytes(), change.val.bits.tobytes()]
    return compress(b"".join(parts))


def decode_values(payload: bytes, mirror: State) -> State:
    plain, start = zstandard.ZstdDecompressor().decompress(payload), 0
    for tensor in mirror.tensors.values():
        count, width = int.from_bytes(plain[start : start + 8], "little"), plain[start + 8]
        if count:
            gap = np.frombuffer(plain, f"<u{width}", count, start + 9)
            values = np.frombuffer(plain, np.uint16, count, start + 9 + width * count)
            GapAbs(gap, BitTensor(tensor.dtype, (count,), values)).apply_to(tensor.bits)
        start += 9 + (width + 2) * count
    return mirror


def encode_xor(old: State, new: State) -> bytes:
    return compress(b"".join((before ^ after.bits).tobytes() for before, after in pairs(old, new)))


def decode_xor(payload: bytes, mirror: State) -> State:
    plain, start = zstandard.ZstdDecompressor().decompress(payload), 0
    for tensor in mirror.tensors.values():
        tensor.bits[...] ^= np.frombuffer(plain, np.uint16, tensor.bits.size, start)
        start += tensor.bits.nbytes
    return mirror


# Updates to encode


def updates(warm_up: int) -> Iterator[tuple[float, State, State]]:
    """At every learning rate: the rate, and the weights before and after one step."""
    set_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=7,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=48,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0)
    tokens = document_tokens()
    for _ in range(warm_up):
        take_step(model, optimizer, tokens)
    for lr in LEARNING_RATES:
        for group in optimizer.param_groups:
            group["lr"] = lr
        take_step(model, optimizer, tokens)
        old = published(model, version=1)
        take_step(model, optimizer, tokens)
        yield lr, old, published(model, version=2)


def document_tokens() -> torch.Tensor:
    """This repository's documents, two letters to a token."""
    data = b"".join(path.read_bytes() for path in sorted((ROOT / "docs").rglob("*.md")))
    pairs_of_letters = np.frombuffer(data[: len(data) // 2 * 2], np.uint16).astype(np.int64)
    return torch.from_numpy(pairs_of_letters % VOCAB)


def take_step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> None:
    starts = torch.randint(len(tokens) - 65, (4,))
    batch = torch.stack([tokens[start : start + 65] for start in starts])
    optimizer.zero_grad()
    logits = model(batch[:, :-1]).logits
    cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def published(model: PreTrainedModel, *, version: int) -> State:
    return State.of_torch(version, {name: parameter.bfloat16() for name, parameter in model.named_parameters()})


def longer(state: State, copies: int) -> State:
    """Every tensor ``copies`` times in a row: for speed only, since equal rows compress too well."""
    return State(
        state.version,
        {
            name: BitTensor(tensor.dtype, (copies, *tensor.shape), np.tile(tensor.bits, copies))
            for name, tensor in state.tensors.items()
        },
    )


# Measurement


def measure(
    lr: float, old: State, new: State, *, copies: int, repeats: int, pool: ThreadPoolExecutor
) -> Iterator[CodecResult]:
    long_old, long_new = longer(old, copies), longer(new, copies)
    long_old.checksum(pool)  # as for a learner and an actor, who have it from the version before
    changed = sum(np.count_nonzero(before != after.bits) for before, after in pairs(old, new))
    for encoding in encodings(pool):
        size = len(encoding.encode(old, new))
        seconds = [round_trip(encoding, long_old, long_new) for _ in range(repeats)]
        megabytes = long_new.num_bytes / 1e6
        yield CodecResult(
            lr=lr,
            changed_share=changed / new.numel,
            encoding=encoding.name,
            bytes_per_parameter=size / new.numel,
            times_smaller=new.num_bytes / size,
            encode_mb_per_s=megabytes / min(encode_s for encode_s, _ in seconds),
            decode_mb_per_s=megabytes / min(decode_s for _, decode_s in seconds),
        )


def round_trip(encoding: Encoding, old: State, new: State) -> tuple[float, float]:
    """Seconds to encode and to decode; the result must be ``new`` bit by bit."""
    fresh, mirror = State(new.version, new.tensors), old.copy()  # its digests are part of the work
    encode_s, payload = timed(lambda: encoding.encode(old, fresh))
    decode_s, mirror = timed(lambda: encoding.decode(payload, mirror))
    if any(not np.array_equal(found, expected.bits) for found, expected in pairs(mirror, new)):
        raise SystemExit(f"{encoding.name} is not lossless")
    return encode_s, decode_s


def timed(work: Callable[[], R]) -> tuple[float, R]:
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def codec(*, copies: int, repeats: int, warm_up: int) -> list[CodecResult]:
    """Every encoding at every learning rate."""
    results = []
    with ThreadPoolExecutor(1) as pool:
        for lr, old, new in updates(warm_up):
            for result in measure(lr, old, new, copies=copies, repeats=repeats, pool=pool):
                print(
                    f"lr {lr:g}  changed {result.changed_share:7.2%}  {result.encoding:32}"
                    f"{result.bytes_per_parameter:8.4f} B/param {result.times_smaller:7.1f}x smaller"
                    f"{result.encode_mb_per_s:8.0f} MB/s encode{result.decode_mb_per_s:8.0f} MB/s decode+apply"
                )
                results.append(result)
    return results


def main(copies: int = 8, repeats: int = 3, warm_up: int = 30, output: Path = RESULT) -> None:
    torch.set_num_threads(1)
    results = codec(copies=copies, repeats=repeats, warm_up=warm_up)
    output.write_text(
        json.dumps({"machine": describe_machine(), "codec": [asdict(one) for one in results]}, indent=1) + "\n"
    )


if __name__ == "__main__":
    typer.run(main)
