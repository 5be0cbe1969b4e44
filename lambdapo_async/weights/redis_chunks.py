"""Weight files inside Redis, in pieces of 2 MB."""

from collections.abc import Callable

from lambdapo_async.broker.bulk import get_into
from lambdapo_async.broker.client import Broker
from lambdapo_async.broker.replies import as_value
from lambdapo_async.broker.script import Script
from lambdapo_async.keys import RunKeys
from lambdapo_async.weights.catch_up import Available
from lambdapo_async.weights.manifest import CHUNK_BYTES, Manifest, NewFile, cut, name_of

_CHUNKS_AT_ONCE = 8  # 16 MB of replies: below the server's output buffer limit


class RedisChunks:
    """The payloads of one run."""

    def __init__(self, broker: Broker, keys: RunKeys) -> None:
        self._broker, self._keys = broker, keys
        self._put = Script(broker, "weights_put", fenced=True)

    def manifest(self, file: NewFile, *, fence: int) -> Manifest:
        """How ``file`` will be cut; whose it is, the server checks at every piece."""
        del fence
        return Manifest.in_chunks(file)

    def put(self, manifest: Manifest, payload: bytes, *, fence: int) -> None:
        """Store every piece.

        Raises:
            FencedError: another learner owns the run.
        """
        for key, chunk in zip(self.names(manifest), cut(payload), strict=True):
            self._put([self._keys.state, key], [fence, chunk])

    def read(self, manifest: Manifest, renew: Callable[[], None]) -> bytearray:
        """All pieces, each verified; ``renew`` is called before each 16 MB.

        A connection that breaks costs what is on its way: those pieces are asked for again.

        Raises:
            WeightsLostError: a piece is not there any more.
            WeightsError: a piece is damaged.
            BrokerUnavailable: Redis did not answer before the deadline.
        """
        payload, names = bytearray(manifest.num_bytes), self.names(manifest)
        views, first = cut(payload), 0
        manifest.check_lengths([len(view) for view in views])
        while first < len(names):
            renew()
            batch = slice(first, first + _CHUNKS_AT_ONCE)
            num_read = self._get_into(names[batch], views[batch])
            for index in range(first, first + num_read):
                manifest.check_chunk(index, views[index])
            first += num_read
            if num_read == 0:  # not what was published, or refused
                chunk = manifest.check_chunk(first, self._get(names[first]))
                views[first][:] = chunk
                first += 1
        return payload

    def names(self, manifest: Manifest) -> list[bytes]:
        """The keys of all pieces."""
        return [self._keys.weights_chunk(manifest.name, index) for index in range(len(manifest.chunk_bytes))]

    def names_of(self, file: Available) -> list[bytes]:
        """The same, of a file whose manifest may be lost."""
        num_chunks = -(-file.num_bytes // CHUNK_BYTES)
        return [self._keys.weights_chunk(name_of(file), index) for index in range(num_chunks)]

    def _get_into(self, names: list[bytes], views: list[memoryview]) -> int:
        num_read: int = self._broker.call(lambda client: get_into(client, names, views))
        return num_read

    def _get(self, name: bytes) -> bytes | None:
        return as_value(self._broker.call(lambda client: client.get(name)))
