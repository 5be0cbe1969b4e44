"""Everything that reads bytes which somebody else wrote: only its own error may come out, whatever goes in."""

import contextlib
import random
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgpack

from lambdapo_async.broker.descriptors import read_descriptor, read_name
from lambdapo_async.broker.fleet import RedisFleet
from lambdapo_async.broker.interface import Descriptor, Heartbeat
from lambdapo_async.errors import LambdaPOError, WeightsError, WireFormatError
from lambdapo_async.journal.history import History
from lambdapo_async.journal.journal import Journal
from lambdapo_async.journal.records import GroupRecord, StepRecord, VersionRecord, decode_record, encode_record
from lambdapo_async.journal.segment import SegmentId, read_frames
from lambdapo_async.rollout import Lease
from lambdapo_async.seal import Seal, SealError
from lambdapo_async.weights.canary import Canary
from lambdapo_async.weights.delta_file import read_delta, read_full, write_full
from lambdapo_async.weights.manifest import Manifest, unpack_available
from lambdapo_async.wire import decode_group, encode_group
from tests.groups import MAX_VERSION, VOCAB_SIZE, make_group

_MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Target:
    """One reader."""

    name: str
    read: Callable[[bytes], object]
    """Raises nothing but :attr:`errors`."""
    errors: tuple[type[Exception], ...]
    seeds: tuple[bytes, ...]
    """What it reads on a good day: mutations start from here."""

    def __call__(self, content: bytes) -> None:
        """``AssertionError`` never; anything that is not one of ours is a find."""
        with contextlib.suppress(*self.errors):
            self.read(content)


def targets() -> list[Target]:
    """All of them."""
    return [
        _group(), _sealed(), _descriptor(), _record(), _segment(), _heartbeat(), _lease(), _manifest(), _catalogue(),
        _canary(), _weights(),
    ]  # fmt: skip


def mutated(seed: bytes, source: random.Random) -> bytes:
    """A few random edits: flips, cuts, repeats, and numbers that programs stumble over."""
    content = bytearray(seed)
    for _ in range(source.randrange(1, 8)):
        place = source.randrange(len(content) + 1)
        match source.randrange(6):
            case 0 if content:
                content[min(place, len(content) - 1)] ^= 1 << source.randrange(8)
            case 1:
                del content[place : place + source.randrange(1, 16)]
            case 2:
                content[place:place] = source.randbytes(source.randrange(1, 16))
            case 3:
                content[place : place + 4] = source.choice(
                    (b"\xff" * 4, b"\x00" * 4, b"\x7f\xff\xff\xff", b"\xdd\xff\xff\xff", b"\xca\x7f\xc0\x00")
                )
            case 4:
                end = source.randrange(len(content) + 1)
                content[place:place] = content[min(place, end) : max(place, end)][:256]
            case _:
                del content[place:]
    return bytes(content)


def _group() -> Target:
    groups = [make_group(), make_group(7, rewards=(1.0,) * 3, version=5, num_tokens=40)]

    def read(content: bytes) -> object:
        return decode_group(content, vocab_size=VOCAB_SIZE, max_version=MAX_VERSION)

    return Target("group", read, (WireFormatError,), tuple(map(encode_group, groups)))


def _records() -> list[GroupRecord | StepRecord | VersionRecord]:
    payload = encode_group(make_group())
    descriptor = Descriptor("actor-a.0", 1, Lease("train", 3), 0, len(payload), 0.5)
    return [
        GroupRecord(descriptor, payload),
        GroupRecord(descriptor, b"", "zero_variance"),
        StepRecord(1, 0, 2, (1,), ((2, "stale"),)),
        VersionRecord(1),
    ]


def _record() -> Target:
    return Target(
        "record",
        lambda content: decode_record(content, b""),
        (LambdaPOError,),
        tuple(encode_record(record)[0] for record in _records()),
    )


def _segment() -> Target:
    with tempfile.TemporaryDirectory() as name:
        journal = Journal.open(Path(name), 1)
        journal.append(_records())
        journal.append(_records())
        journal.close()
        seed = (Path(name) / SegmentId(1, 1).name).read_bytes()

    def read(content: bytes) -> object:
        with tempfile.TemporaryDirectory(dir=_memory()) as folder:
            path = Path(folder) / SegmentId(1, 1).name
            path.write_bytes(content)
            list(read_frames(path))
            return list(History.find(Path(folder)).read(1))

    return Target("segment", read, (LambdaPOError,), (seed,))


def _memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def _heartbeat() -> Target:
    heartbeat = Heartbeat(
        actor_id="a", host="h", pid=1, state="sampling", device="cpu", dtype="float32", engine="scripted",
        policy_version=1, groups_in_flight=1, groups_sent=1, completions=1, tokens=1, tokens_per_s=1.0,
        idle_share=0.5, counters={"x": 1.0}, sent_at=1.0,
    )  # fmt: skip
    fleet = RedisFleet.__new__(RedisFleet)  # its decoder needs no server
    fleet.num_unreadable = 0
    return Target("heartbeat", fleet._decode, (), (msgpack.packb(heartbeat.model_dump()),))


def _lease() -> Target:
    def read(content: bytes) -> object:
        return Lease.from_id(content.decode(errors="replace"))

    return Target("lease", read, (WireFormatError,), (b"train:0:17", b"heldout:3:2"))


def _manifest() -> Target:
    manifest = Manifest(name="full-3", num_bytes=4, digest="0" * 32, chunk_bytes=(4,), chunk_digests=(1,))
    seal = Seal(None, run_id="r")
    return Target(
        "manifest",
        lambda content: Manifest.unpack(content, name="full-3", seal=seal),
        (WeightsError,),
        (manifest.pack(seal),),
    )


def _sealed() -> Target:
    """A group behind a signature: nothing but what its key holder wrote gets as far as the decoder."""
    seal, group = Seal("a key of the run", run_id="r"), encode_group(make_group())

    def read(content: bytes) -> object:
        opened = seal.open(content, purpose="group")
        assert opened == group, "a forgery"
        return opened

    return Target("sealed", read, (SealError,), (seal.close(group, purpose="group"),))


def _descriptor() -> Target:
    """An entry of the queue; its fields' values, one per line."""
    names = (b"p", b"s", b"l", b"v", b"n", b"r")

    def read(content: bytes) -> object:
        fields = dict(zip(names, content.split(b"\n"), strict=False))
        read_name(fields)
        return read_descriptor(fields)

    return Target("descriptor", read, (WireFormatError,), (b"a.0\n7\ntrain:0:3\n1\n300\n0.5",))


def _catalogue() -> Target:
    def read(content: bytes) -> object:
        file = unpack_available(content)
        assert isinstance(file.version, int), file
        assert isinstance(file.num_bytes, int), file
        assert file.base_version is None or isinstance(file.base_version, int), file
        assert file.base_min is None or isinstance(file.base_min, int), file
        return file

    return Target("catalogue", read, (WeightsError,), (msgpack.packb([3, 100, None, None]),))


def _canary() -> Target:
    row = {"prompt_ids": [1, 2], "completion_ids": [3], "logprobs": [-0.5]}
    canary = Canary.model_validate(
        {
            "version": 1, "checksum": "xxh3_128:" + "0" * 32, "config_hash": "0" * 32, "tokenizer_hash": "0" * 32,
            "dtype": "bfloat16", "rows": [row],
        }
    )  # fmt: skip
    return Target("canary", Canary.from_bytes, (WeightsError,), (canary.to_bytes(),))


def _weights() -> Target:
    import torch

    from lambdapo_async.weights.state import State
    from lambdapo_async.weights.tensor_file import compress

    pool = ThreadPoolExecutor(1)
    state = State.of_torch(1, {"a": torch.zeros(8, dtype=torch.bfloat16), "b.c": torch.ones(3, dtype=torch.bfloat16)})
    seed = compress(write_full(state, run_id="r", pool=pool))

    def read(content: bytes) -> object:
        with contextlib.suppress(WeightsError):
            read_delta(content, max_bytes=_MAX_BYTES)
        return read_full(content, run_id="r", version=1, max_bytes=_MAX_BYTES, pool=pool)

    return Target("weights", read, (WeightsError,), (seed,))
