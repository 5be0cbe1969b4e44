"""What a run under faults is: one config for every process, and how each is told who it is."""

from dataclasses import dataclass
from pathlib import Path

from tests.chaos.proof import Bounds

RUN_ID = "chaos"
GROUPS_PER_STEP = 4
MAX_STALENESS = 2
_MAX_JOURNAL_BYTES = 16 * 1024**2
_BESIDE_GROUPS_BYTES = 1024**2
"""Of data that a server may hold besides groups: rows, model files, weights, marks, answered leases, requests on their
way. Measured: 0.55 MB at most."""
LEASE_S, HEARTBEAT_S, TIMEOUT_S = 1.5, 0.3, 3.0

_CONFIG = f"""
name = "chaos"
seed = {{seed}}
output_dir = "{{output_dir}}"
[model]
path = "counting"
max_length = {{max_length}}
[task]
kind = "arithmetic"
digits = 2
num_train = 96
num_heldout = 4
[sampling]
max_tokens = {{max_tokens}}
[rollout]
group_size = 2
groups_per_step = {GROUPS_PER_STEP}
[staleness]
max_staleness = {MAX_STALENESS}
drop_above = {{drop_above}}
[learner]
num_steps = {{num_steps}}
checkpoint_every = 5
data_timeout_s = 60.0
micro_batch_tokens = 1024
record = {{record}}
[replay]
max_uses = {{max_uses}}
[evaluation]
every_steps = 40
num_prompts = 3
[broker]
max_groups = 400
max_bytes = {{queue_bytes}}
lease_s = {LEASE_S}
heartbeat_s = {HEARTBEAT_S}
timeout_s = {TIMEOUT_S}
outage_s = 60.0
[actor]
spool_dir = "{{spool_dir}}"
max_groups_in_flight = 3
handoff = {{handoff}}
drain_s = 5.0
[weights]
grace_s = 1.0
union_every = 4
"""


@dataclass(frozen=True, slots=True)
class Variant:
    """What differs from one run under faults to the next, besides its faults."""

    max_tokens: int = 6
    """Of a completion: how large groups are, and how long they take."""
    drop_above: int = 8
    """Versions that a group may be old."""
    max_uses: int = 1
    """Above 1 groups are drawn out of order, and stay in the replay queue."""
    record: bool = False
    """Whether the journal keeps everything."""
    handoff: bool = False
    """Whether actors that end leave partial samples to others."""
    queue_bytes: int = 256 * 1024
    """What Redis may hold of groups."""
    hmac_key: str = ""
    """With which everything is signed, if it is."""

    @property
    def bounds(self) -> Bounds:
        return Bounds(
            groups_per_step=GROUPS_PER_STEP,
            drop_above=self.drop_above,
            max_uses=self.max_uses,
            max_bytes={
                "queue": self.queue_bytes,
                "server": self._server_bytes,
                # An actor keeps what the queue or the learner has of it, and what it is about to offer.
                "outbox": 2 * self.queue_bytes,
                "journal": _MAX_JOURNAL_BYTES,
            },
        )

    @property
    def _server_bytes(self) -> int:
        """What docs/operations.md asks of ``maxmemory``, for a run as small as this one."""
        partials = self.queue_bytes // 8 if self.handoff else 0
        return self.queue_bytes * 5 // 4 + partials + _BESIDE_GROUPS_BYTES


VARIANTS = (
    Variant(),
    Variant(max_tokens=250, handoff=True),
    Variant(max_uses=2),
    Variant(record=True, queue_bytes=60_000),
    Variant(max_tokens=120, max_uses=2, handoff=True, hmac_key="a key of the run's own"),
    Variant(drop_above=MAX_STALENESS + 1),
)


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process that is about to be forked."""

    who: str
    """Names its ledger, its log and its fault point."""
    folder: Path
    """Of the run under faults: ledgers, logs, config, outputs."""
    url: str
    resume: bool = False
    mutant: str = ""
    """What is broken on purpose in it (``mutants.MUTANTS``)."""
    hmac_key: str = ""

    @property
    def config_path(self) -> Path:
        return self.folder / "config.toml"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.who}.log"


def output_dir(folder: Path) -> Path:
    """Of the runs of a scene; there is one, ``RUN_ID``."""
    return folder / "outputs"


def spool_dir(folder: Path) -> Path:
    """Where the actors of a scene keep their groups."""
    return folder / "spool"


def write_config(folder: Path, variant: Variant, *, seed: int, num_steps: int) -> None:
    text = _CONFIG.format(
        seed=seed,
        output_dir=output_dir(folder),
        spool_dir=spool_dir(folder),
        num_steps=num_steps,
        max_length=18 + variant.max_tokens,
        max_tokens=variant.max_tokens,
        drop_above=variant.drop_above,
        max_uses=variant.max_uses,
        handoff=str(variant.handoff).lower(),
        queue_bytes=variant.queue_bytes,
        record=str(variant.record).lower(),
    )
    partial = folder / "config.partial"
    partial.write_text(text)
    partial.rename(folder / "config.toml")
