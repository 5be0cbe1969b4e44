"""Whether a Redis server is set up so that a run can rely on it: one finding per setting, with what to change."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import redis

from lambdapo_async.broker.connection import OLDEST

_MIB = 2**20
_HEADROOM = 1.25
"""Of the queue's bytes: keys, streams, fragmentation."""
_BESIDE_BYTES = 200 * _MIB
"""For rows, model files, marks and what is kept of unreadable groups."""
_LOOPBACK = ("127.", "::1", "localhost", "-::1")


@dataclass(frozen=True, slots=True)
class Finding:
    """One setting."""

    name: str
    found: str
    problem: str | None
    """What is wrong and what to change; None when it is right."""

    def __str__(self) -> str:
        line = f"{'ok  ' if self.problem is None else 'FAIL'} {self.name} {self.found}"
        return line if self.problem is None else f"{line}: {self.problem}"


def examine(client: redis.Redis, url: str, *, max_bytes: int) -> list[Finding]:
    """Every finding about the server behind ``client``.

    Args:
        client: of any user; what it may not see is a finding.
        url: what the processes of a run will be given.
        max_bytes: ``broker.max_bytes`` of the runs.

    Raises:
        redis.RedisError: the server cannot be asked at all.
    """
    info: Mapping[str, Any] = client.info("server")
    try:
        settings: Mapping[str, str] = {str(name): str(value) for name, value in client.config_get("*").items()}
    except redis.ResponseError as error:  # no right, or a provider that took the command away
        settings = {}
        unseen = [Finding("CONFIG GET", "", f"cannot be asked ({error}): run the doctor as the server's administrator")]
    else:
        unseen = []
    checks = [Finding("version", *_version(str(info["redis_version"]))), *unseen]
    if settings:
        checks += [Finding(name, *check(settings[name])) for name, check in _checks(max_bytes) if name in settings]
        checks += [Finding("access", *_access(client, settings))]
    return [*checks, Finding("transport", *_transport(url))]


Verdict = tuple[str, str | None]


def _checks(max_bytes: int) -> Iterator[tuple[str, Callable[[str], Verdict]]]:
    needed = int(_HEADROOM * max_bytes) + _BESIDE_BYTES

    def memory(found: str) -> Verdict:
        problem = (
            f"set it to {needed} or more: 1.25 x broker.max_bytes ({max_bytes}) + 200 MiB, and add the weights' "
            "bytes if they lie here too, and an eighth of broker.max_bytes with actor.handoff"
        )
        return found, None if int(found) >= needed else problem

    yield "maxmemory", memory
    yield "maxmemory-policy", _must_be("noeviction", "any other silently deletes payloads")
    yield "appendonly", _must_be("yes", "a restart loses the queue, and every actor sends again")
    yield "appendfsync", _must_be("everysec", "always is slow, no loses more than a second")
    yield "save", _must_be("", "snapshots double the memory for nothing beside the append-only file")
    yield "client-output-buffer-limit", _buffers
    yield "client-query-buffer-limit", _at_least(64 * _MIB, "a client that sends rubbish must not take all memory")


def _must_be(wanted: str, why: str) -> Callable[[str], Verdict]:
    def check(found: str) -> Verdict:
        shown = f'set it to "{wanted}": {why}'
        return found or '""', None if found == wanted else shown

    return check


def _at_least(wanted: int, why: str) -> Callable[[str], Verdict]:
    def check(found: str) -> Verdict:
        return found, None if 0 < int(found) <= 16 * wanted and int(found) >= wanted else f"set it to {wanted}: {why}"

    return check


def _buffers(found: str) -> Verdict:
    words = found.split()
    normal = words[words.index("normal") + 1 :][:3] if "normal" in words else ["0"]
    hard = int(normal[0])
    if hard >= 64 * _MIB:
        return f"normal {' '.join(normal)}", None
    problem = "no limit: a reader that hangs takes all memory" if hard == 0 else "too small for one read of 16 MiB"
    return f"normal {' '.join(normal)}", f"{problem}; set it to normal 64mb 32mb 30"


def _version(found: str) -> Verdict:
    major, minor = (int(part) for part in found.split(".")[:2])
    wanted = ".".join(map(str, OLDEST))
    return found, None if (major, minor) >= OLDEST else f"install Redis {wanted} or later, or Valkey"


def _access(client: redis.Redis, settings: Mapping[str, str]) -> Verdict:
    """Who can come in from where."""
    is_public = settings.get("port") != "0" and any(
        not address.startswith(_LOOPBACK) for address in settings.get("bind", "").split() or ["*"]
    )
    if not is_public:
        return "from this machine only", None
    try:
        default: Mapping[str, Any] = client.acl_getuser("default") or {}
    except redis.ResponseError:
        default = {}
    is_open = "nopass" in default.get("flags", []) and "on" in default.get("flags", [])
    if is_open and settings.get("protected-mode") == "no":
        return "from everywhere, without a password", "whoever reaches its port owns the run: use scripts/redis-acl"
    return "by password", None


def _transport(url: str) -> Verdict:
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme in ("rediss", "unix") or host.startswith(_LOOPBACK):
        return parts.scheme, None
    return f"{parts.scheme} to {host}", "passwords and groups cross the network unencrypted: use rediss:// or a tunnel"
