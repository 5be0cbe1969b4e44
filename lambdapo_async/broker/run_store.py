"""What an actor needs to join, over Redis: config, model files, rows, phase."""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import get_args

import msgpack
import redis
import zstandard
from pydantic import TypeAdapter

from lambdapo_async.broker.client import Broker
from lambdapo_async.broker.interface import Phase, RunState
from lambdapo_async.broker.ownership import Ownership
from lambdapo_async.broker.replies import as_fields, as_number, as_text, exactly
from lambdapo_async.broker.script import Script
from lambdapo_async.errors import BrokerError, ConfigError, RunNotFoundError, RunNotPublishedError, TaskError
from lambdapo_async.keys import RunKeys
from lambdapo_async.rollout import Split
from lambdapo_async.seal import Seal, SealError

PROTOCOL_SCHEMA = 3
"""Raised whenever an older process could misread or corrupt what a newer one keeps in Redis."""
ROWS_PER_CHUNK = 256
MAX_SPLIT_BYTES = 1024**3
"""Compressed rows of one split; they share Redis' memory with the queue."""
_CHUNKS_CACHED = 128
_CONFIG = "config"
_PHASES: tuple[Phase, ...] = get_args(Phase)
_MAX_CHUNK_BYTES = 512 * 1024**2  # decompressed: 2 MB per row; more is damage or a bomb

FoundRow = dict[str, str | None]
_ROWS = TypeAdapter(list[FoundRow])


class RedisRunStore:
    """The published run (see ``interface.RunStore``)."""

    def __init__(
        self,
        broker: Broker,
        keys: RunKeys,
        ownership: Ownership,
        seal: Seal,
        *,
        max_split_bytes: int = MAX_SPLIT_BYTES,
    ) -> None:
        self._broker, self._keys, self._ownership, self._seal = broker, keys, ownership, seal
        self._max_split_bytes = max_split_bytes
        self._set_phase = Script(broker, "set_phase", fenced=True)
        self._chunk = lru_cache(maxsize=_CHUNKS_CACHED)(self._fetch_chunk)

    def take_over(self, *, fence: int) -> None:
        """Raise the run's fence."""
        self._ownership.take_over(fence, {})

    def create(self, config_json: bytes, model_files: Mapping[str, bytes], *, fence: int) -> None:
        """Publish config and model files under our fence; the run is ``starting`` from here on."""
        self._ownership.take_over(fence, {"schema": PROTOCOL_SCHEMA, "phase": "starting"})

        def publish(client: redis.Redis) -> None:
            pipeline = client.pipeline(transaction=True)
            pipeline.set(self._keys.config, self._seal.close(config_json, purpose=_CONFIG))
            pipeline.delete(self._keys.model_files)
            for name, content in model_files.items():
                pipeline.hset(self._keys.model_files, name, content)
            pipeline.execute()

        self._broker.call(publish)

    def put_rows(self, split: Split, rows: Sequence[Mapping[str, str | None]]) -> None:
        """Publish a split's rows in chunks. Actors may read meanwhile: what is replaced is never missing.

        Raises:
            TaskError: they are too many for Redis.
        """
        chunks = list(self._compressed(split, rows))

        def publish(client: redis.Redis) -> None:
            name = self._keys.rows(split)
            for number, chunk in enumerate(chunks):
                client.hset(name, str(number), chunk)
            client.hset(self._keys.state, f"rows_{split}", len(rows))
            surplus = set(client.hkeys(name)) - {b"%d" % number for number in range(len(chunks))}
            if surplus:
                client.hdel(name, *surplus)

        self._broker.call(publish)
        self._chunk.cache_clear()

    def config_json(self) -> bytes:
        """The published config.

        Raises:
            RunNotFoundError: there is none, or its schema is not ours.
            ConfigError: it is not signed with our key, or only one side has a key.
        """
        self.state()
        config = self._broker.call(lambda client: client.get(self._keys.config))
        if not isinstance(config, bytes):
            raise RunNotPublishedError(f"run {self._keys.run_id} has no config yet: is its learner still starting?")
        try:
            return self._seal.open(config, purpose=_CONFIG)
        except SealError as error:
            raise ConfigError(f"the config of run {self._keys.run_id} cannot be trusted: {error}") from error

    def model_files(self) -> dict[str, bytes]:
        """File name -> content.

        Raises:
            RunNotPublishedError: there is none.
        """
        files = as_fields(self._broker.call(lambda client: client.hgetall(self._keys.model_files)))
        if not files:
            raise RunNotPublishedError(
                f"run {self._keys.run_id} has no model files yet: is its learner still starting?"
            )
        return {name.decode(errors="backslashreplace"): content for name, content in files.items()}

    def num_rows(self, split: Split) -> int:
        """Rows of a split."""
        count = self._broker.call(lambda client: client.hget(self._keys.state, f"rows_{split}"))
        if count is None:
            raise RunNotPublishedError(
                f"run {self._keys.run_id} has no {split} rows yet: is its learner still starting?"
            )
        return as_number(count, f"rows_{split}")

    def is_published(self, *, num_files: int, num_rows: Mapping[Split, int]) -> bool:
        """Whether config, so many model files and so many rows are there: by their numbers alone, in one round trip."""
        keys = self._keys

        def look(client: redis.Redis) -> object:
            pipeline = client.pipeline(transaction=False)
            pipeline.exists(keys.config)
            pipeline.hlen(keys.model_files)
            for split in num_rows:
                pipeline.hlen(keys.rows(split))
                pipeline.hget(keys.state, f"rows_{split}")
            return pipeline.execute()

        wanted = [part for rows in num_rows.values() for part in (-(-rows // ROWS_PER_CHUNK), b"%d" % rows)]
        return bool(self._broker.call(look) == [1, num_files, *wanted])

    def row(self, split: Split, index: int) -> FoundRow:
        """One row; chunks are cached.

        Raises:
            RunNotFoundError: Redis lost the rows, or never had this many.
            BrokerError: no such row, or it is damaged.
        """
        chunk, place = divmod(index, ROWS_PER_CHUNK)
        rows = self._chunk(split, chunk)
        if not 0 <= place < len(rows):
            raise BrokerError(f"run {self._keys.run_id} has no row {index} in {split}")
        return rows[place]

    def state(self) -> RunState:
        """Phase, epoch and version.

        Raises:
            RunNotFoundError: the run is not in this Redis, or its schema is not ours.
            BrokerError: a number in it is damaged.
        """

        def look(client: redis.Redis) -> object:
            pipeline = client.pipeline(transaction=False)
            pipeline.hmget(self._keys.state, ["schema", "phase", "epoch", "version", "seen"])
            pipeline.time()
            return pipeline.execute()

        found, (now_s, now_us) = self._broker.call(look)
        schema, phase, epoch, version, seen_ms = exactly(found, 5)
        if schema is None or phase is None or epoch is None:
            raise RunNotPublishedError(f"this Redis holds no run {self._keys.run_id!r}: check the run id and the URL")
        found_schema = as_number(schema, "schema")
        if found_schema != PROTOCOL_SCHEMA:
            raise RunNotFoundError(
                f"run {self._keys.run_id} speaks schema {found_schema}, this version speaks {PROTOCOL_SCHEMA}: "
                "install the learner's version of lambdapo-async"
            )
        newest = -1 if version is None else as_number(version, "version")
        silent_s = now_s + now_us / 1e6 - as_number(seen_ms or 0, "seen") / 1000
        return RunState(_phase(phase), as_text(epoch), newest, found_schema, silent_s)

    def set_phase(self, phase: Phase, *, fence: int) -> None:
        """``running`` once the first weights are out; ``finished`` tells the actors to drain and exit 0."""
        self._set_phase([self._keys.state], [fence, phase])

    def _compressed(self, split: Split, rows: Sequence[Mapping[str, str | None]]) -> Iterator[bytes]:
        compressor, total = zstandard.ZstdCompressor(), 0
        for first in range(0, len(rows), ROWS_PER_CHUNK):
            chunk = compressor.compress(msgpack.packb([dict(row) for row in rows[first : first + ROWS_PER_CHUNK]]))
            total += len(chunk)
            if total > self._max_split_bytes:
                raise TaskError(
                    f"the first {first + ROWS_PER_CHUNK} of {len(rows)} {split} rows take {total} bytes compressed, "
                    f"more than {self._max_split_bytes}: set task.max_rows"
                )
            yield chunk

    def _fetch_chunk(self, split: Split, number: int) -> list[FoundRow]:
        chunk = self._broker.call(lambda client: client.hget(self._keys.rows(split), str(number)))
        if not isinstance(chunk, bytes):
            first = number * ROWS_PER_CHUNK
            raise RunNotFoundError(f"run {self._keys.run_id} has no rows from {first} on in {split}")
        try:
            return _unpacked(chunk)
        except (zstandard.ZstdError, ValueError, msgpack.UnpackException) as error:
            raise BrokerError(f"chunk {number} of the {split} rows is damaged: {error!s:.200}") from error


def _phase(found: object) -> Phase:
    for phase in _PHASES:
        if phase == as_text(found):
            return phase
    raise BrokerError(f"phase of the run is damaged in Redis: {found!r:.80}")


def _unpacked(chunk: bytes) -> list[FoundRow]:
    """The rows of a chunk whose declared length is acceptable, before anything is allocated."""
    num_bytes = zstandard.get_frame_parameters(chunk).content_size
    if num_bytes > _MAX_CHUNK_BYTES:
        raise ValueError(f"it decompresses to {num_bytes} bytes, at most {_MAX_CHUNK_BYTES} are allowed")
    packed = zstandard.ZstdDecompressor().decompress(chunk, allow_extra_data=False)
    return _ROWS.validate_python(msgpack.unpackb(packed, max_array_len=ROWS_PER_CHUNK, max_map_len=16), strict=True)
