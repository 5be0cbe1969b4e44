"""Who holds the run's key has made these bytes, and nobody has changed them since: a keyed hash before a payload.

BLAKE2b with a key is a message authentication code (RFC 7693, section 2.9). The tag also covers the run and what the
bytes are for, so that nothing of another run, and no manifest in place of a group, passes. It hides nothing: that is
TLS's part. Without a key nothing is sealed, and what is sealed is refused.
"""

import hashlib
import hmac

from lambdapo_async.errors import WireFormatError

MIN_KEY_LENGTH = 16
"""Characters: whoever sees a sealed message can try out shorter keys."""

_MAGIC = b"\xc1LP1"  # no msgpack message, no JSON text and no safetensors file begins with it
_TAG_BYTES = 32
SEAL_BYTES = len(_MAGIC) + _TAG_BYTES
"""What a seal adds to a message."""


class SealError(WireFormatError):
    """Bytes that were not made by a holder of the run's key, or a key on one side alone."""


class Seal:
    """Closes and opens the messages of one run.

    Args:
        key: ``broker.hmac_key``; None seals nothing.
    """

    def __init__(self, key: str | None, *, run_id: str) -> None:
        # A key of any length, as the 64 bytes that BLAKE2b takes.
        self._key = None if key is None else hashlib.blake2b(key.encode()).digest()
        self._run_id = run_id.encode()

    def __repr__(self) -> str:
        return f"Seal(run_id={self._run_id.decode()!r}, {'off' if self._key is None else 'on'})"

    @property
    def is_on(self) -> bool:
        """Whether there is a key."""
        return self._key is not None

    def close(self, message: bytes, *, purpose: str) -> bytes:
        """``message`` behind its tag; the message itself without a key."""
        if self._key is None:
            return message
        return b"".join((_MAGIC, self._tag(self._key, message, purpose), message))

    def open(self, sealed: bytes, *, purpose: str) -> bytes:
        """The message inside, looked at by nobody before its tag was found right.

        Raises:
            SealError: it was changed, made with another key or for another purpose, or only one side has a key.
        """
        is_sealed = sealed.startswith(_MAGIC)
        if self._key is None:
            if is_sealed:
                raise SealError("it is signed, and this process has no key: set LAMBDAPO_HMAC_KEY to the learner's")
            return sealed
        if not is_sealed:
            raise SealError("it is not signed, and this run's messages are: its sender has no LAMBDAPO_HMAC_KEY")
        tag, message = sealed[len(_MAGIC) : SEAL_BYTES], sealed[SEAL_BYTES:]
        if not hmac.compare_digest(tag, self._tag(self._key, message, purpose)):
            raise SealError("its signature is wrong: it was changed, or signed with another LAMBDAPO_HMAC_KEY")
        return message

    def _tag(self, key: bytes, message: bytes, purpose: str) -> bytes:
        tag = hashlib.blake2b(key=key, digest_size=_TAG_BYTES)
        for part in (self._run_id, purpose.encode()):
            tag.update(len(part).to_bytes(4, "little") + part)
        tag.update(message)
        return tag.digest()
