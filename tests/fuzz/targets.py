"""Everything that reads bytes which somebody else wrote: only its own error may come out, whatever goes in."""

import contextlib
import json
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgpack
import zstandard

from actors.handoff import Handoff
from actors.session import _check_model_files
from lambdapo_async.broker.descriptors import read_descriptor, read_name
from lambdapo_async.broker.fleet import RedisFleet
from lambdapo_async.broker.interface import Descriptor, Heartbeat
from lambdapo_async.broker.ownership import Ownership
from lambdapo_async.broker.run_store import RedisRunStore
from lambdapo_async.config.load import parse_published
from lambdapo_async.errors import LambdaPOError, WeightsError, WireFormatError
from lambdapo_async.journal.history import History
from lambdapo_async.journal.journal import Journal
from lambdapo_async.journal.records import GroupRecord, StepRecord, VersionRecord, decode_record, encode_record
from lambdapo_async.journal.segment import SegmentId, read_frames
from lambdapo_async.rollout import Lease
from lambdapo_async.seal import Seal, SealError
from lambdapo_async.tasks.interface import Row
from lambdapo_async.weights.canary import Canary
from lambdapo_async.weights.delta_file import read_delta, read_full, write_full
from lambdapo_async.weights.manifest import Manifest, unpack_available
from lambdapo_async.wire import decode_group, encode_group
from tests.fuzz.broker_replies import KEYS, AnsweringBroker, conversations
from tests.groups import MAX_VERSION, VOCAB_SIZE, make_group
from tests.unit import test_handoff

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
        _canary(), _weights(), _rows(), _chunk(), _config(), _model_files(), _partial(), *_conversations(),
    ]  # fmt: skip


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


def _conversations() -> list[Target]:
    return [Target(one.name, one, (LambdaPOError,), (b"",)) for one in conversations()]


def _read_rows(chunk: bytes) -> object:
    broker = AnsweringBroker([chunk])
    store = RedisRunStore(broker, KEYS, Ownership(broker, KEYS), Seal(None, run_id="r"))
    return [Row.from_map(store.row("train", index)) for index in range(3)]


def _packed_rows() -> bytes:
    rows = [{"prompt": f"p{index}", "answer": "é", "solution": None} for index in range(3)]
    packed: bytes = msgpack.packb(rows)
    return packed


def _rows() -> Target:
    """Rows that somebody compressed well."""
    return Target(
        "rows",
        lambda content: _read_rows(zstandard.ZstdCompressor().compress(content)),
        (LambdaPOError,),
        (_packed_rows(),),
    )


def _chunk() -> Target:
    return Target("chunk", _read_rows, (LambdaPOError,), (zstandard.ZstdCompressor().compress(_packed_rows()),))


def _config() -> Target:
    seed = json.dumps(test_handoff.CONFIG.published()).encode()
    return Target("config", lambda content: parse_published(content, run_id="r"), (LambdaPOError,), (seed,))


def _model_files() -> Target:
    """The name of one, and its content as a config."""
    folder = Path("/nowhere")

    def read(content: bytes) -> object:
        name, _, text = content.partition(b"\n")
        broker = AnsweringBroker([{name: text}])
        files = RedisRunStore(broker, KEYS, Ownership(broker, KEYS), Seal(None, run_id="r")).model_files()
        _check_model_files(files)
        for found in files:
            assert (folder / found).resolve().parent == folder, found
        return files

    return Target("model_files", read, (LambdaPOError,), (b"config.json\n{}",))


class _Left:
    """A store in which another actor left ``payload``."""

    def __init__(self, payload: bytes) -> None:
        self._payload = payload

    def leave(self, lease: Lease, payload: bytes) -> bool:
        raise NotImplementedError

    def take(self, lease: Lease) -> bytes | None:
        return self._payload

    def forget(self, lease: Lease) -> None:
        pass


def _partial() -> Target:
    """What is wrong with it costs its tokens, and nothing else."""
    lease = test_handoff.LEASE
    seed = encode_group(test_handoff.SAMPLED.unrewarded(lease, "a"))

    def read(content: bytes) -> object:
        handoff = Handoff(
            _Left(content), Seal(None, run_id="r"), test_handoff.CONFIG,
            actor_id="b", vocab_size=test_handoff.VOCAB, newest_version=lambda: 5,
        )  # fmt: skip
        return handoff.take(lease, test_handoff.PROMPT, version=3)

    return Target("partial", read, (), (seed,))
