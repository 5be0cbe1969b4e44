"""Every Redis key of a run, named here and nowhere else.

The braces are a hash tag: a cluster keeps the whole run in one slot, so that scripts may touch all of it at once.
"""

from dataclasses import dataclass

from lambdapo_async.rollout import Lease, Split

ANY_RUN = "*"
"""As a run id: makes a key of :class:`RunKeys` the pattern of that key in all runs."""


def run_id_of(key: bytes) -> str:
    """The run that ``key``, one of :class:`RunKeys`, belongs to."""
    return key.removeprefix(b"{lp:").partition(b"}:")[0].decode(errors="backslashreplace")


@dataclass(frozen=True, slots=True)
class RunKeys:
    """The keys of one run id."""

    run_id: str

    def _key(self, name: str) -> bytes:
        return f"{{lp:{self.run_id}}}:{name}".encode()

    @property
    def everything(self) -> bytes:
        """Pattern of all keys of the run."""
        return self._key("*")

    @property
    def state(self) -> bytes:
        """Hash: schema, fence, owner, epoch, phase, version, limits and counters."""
        return self._key("st")

    @property
    def config(self) -> bytes:
        """String: the published config as JSON."""
        return self._key("config")

    @property
    def model_files(self) -> bytes:
        """Hash: file name -> content."""
        return self._key("files")

    def rows(self, split: Split) -> bytes:
        """Hash: chunk number -> zstd-compressed msgpack list of rows."""
        return self._key(f"rows:{split}")

    @property
    def queue(self) -> bytes:
        """Stream: one descriptor per uncommitted group."""
        return self._key("q")

    def payload(self, producer: str, seq: int) -> bytes:
        """String: the group itself, beside its descriptor."""
        return self._key(f"g:{producer}:{seq}")

    def offered(self, producer: str, seq: int, lease_id: str) -> bytes:
        """String, expiring: a group on its way in; no other has this name, not even one that held the number before."""
        return self._key(f"g:{producer}:{seq}:{lease_id}")

    @property
    def all_payloads(self) -> bytes:
        """Pattern of every :meth:`payload` and every :meth:`offered` group of this run (run ids hold no wildcard)."""
        return self._key("g:*")

    @property
    def accepted(self) -> bytes:
        """Hash: producer -> last sequence number accepted; and a field without a name, to be missed with the rest."""
        return self._key("prod")

    @property
    def committed(self) -> bytes:
        """Hash: producer -> last sequence number durable at the learner; only ever raised."""
        return self._key("commit")

    @property
    def leases(self) -> bytes:
        """Sorted set: lease id -> expiry in milliseconds of server time."""
        return self._key("lease")

    @property
    def holders(self) -> bytes:
        """Hash: lease id -> actor that holds it; and a field without a name, to be missed with the rest."""
        return self._key("holder")

    @property
    def todo(self) -> bytes:
        """List: training leases that came back, next one first."""
        return self._key("todo")

    @property
    def heldout(self) -> bytes:
        """List: held-out leases to be granted, next one first."""
        return self._key("heldout")

    @property
    def answered(self) -> bytes:
        """Sorted set: lease ids answered lately -> server time of the answer in milliseconds."""
        return self._key("answered")

    def grant(self, actor_id: str) -> bytes:
        """String, expiring: request id and lease ids of the actor's last grant, for a lost reply."""
        return self._key(f"grant:{actor_id}")

    @property
    def partials(self) -> bytes:
        """Hash: lease id -> expiry in milliseconds of server time, a blank, bytes of its partial."""
        return self._key("partials")

    @property
    def all_partials(self) -> bytes:
        """Pattern of what actors left of unfinished groups."""
        return self._key("part:*")

    def partial(self, lease: Lease) -> bytes:
        """String, expiring: what an actor left of an unfinished group."""
        return self._key(f"part:{lease.id}")

    @property
    def fleet(self) -> bytes:
        """Hash: actor id -> heartbeat (msgpack)."""
        return self._key("fleet")

    @property
    def fleet_expiry(self) -> bytes:
        """Sorted set: actor id -> expiry of its heartbeat in milliseconds of server time."""
        return self._key("fleet_expiry")

    @property
    def quarantined(self) -> bytes:
        """Set: ids of the actors that are set aside."""
        return self._key("quarantined")

    @property
    def dead(self) -> bytes:
        """Stream: quarantined groups, the newest ones."""
        return self._key("dead")

    @property
    def all_weights(self) -> bytes:
        """Pattern of everything that has to do with weights."""
        return self._key("w:*")

    def weights_chunk(self, name: str, index: int) -> bytes:
        """String: one piece of a weight file."""
        return self._key(f"w:{name}:{index}")

    @property
    def weights_begun(self) -> bytes:
        """Hash: every weight file that is not deleted -> sizes, checksums and place (msgpack)."""
        return self._key("w:begun")

    @property
    def weights_files(self) -> bytes:
        """Hash: every weight file that may be fetched -> what it leads from and to (msgpack)."""
        return self._key("w:files")

    @property
    def weights_head(self) -> bytes:
        """String: the newest whole version."""
        return self._key("w:latest")

    @property
    def weights_log(self) -> bytes:
        """Stream: one entry per head, for readers that block."""
        return self._key("w:log")

    @property
    def weights_readers(self) -> bytes:
        """Sorted set: ``file|reader`` -> expiry in milliseconds of server time."""
        return self._key("w:readers")

    @property
    def weights_canary(self) -> bytes:
        """String: the learner's log-probabilities of fixed completions (msgpack)."""
        return self._key("w:canary")

    @property
    def weights_canary_wish(self) -> bytes:
        """String: there while somebody waits for a canary of the present version."""
        return self._key("w:canary_wish")
