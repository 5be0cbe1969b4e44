"""What is known of a running run, gathered from its metrics and its fleet."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lambdapo_async.broker.interface import Heartbeat
from lambdapo_async.metrics import EVAL, STEP, MetricRow


@dataclass(slots=True)
class Progress:
    """The numbers a watcher wants; NaN until they are known."""

    num_steps: int
    target: float
    """Held-out reward that ends the run."""
    clock: Callable[[], float] = time.monotonic
    phase: str = "starting"
    """What happens now, in words."""
    step: int = 0
    heldout_start: float = math.nan
    heldout: float = math.nan
    actors_alive: int = 0
    actor_tokens_per_s: float = 0.0
    latest: dict[str, float] = field(default_factory=dict)
    """The newest step's metrics by name."""
    started_at: float = field(init=False)

    def __post_init__(self) -> None:
        self.started_at = self.clock()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return self.clock() - self.started_at

    @property
    def is_half_way(self) -> bool:
        """Whether the held-out reward has passed the middle between its start and the target."""
        return self.heldout >= (self.heldout_start + self.target) / 2

    @property
    def is_target_reached(self) -> bool:
        """Whether the newest held-out reward is at the target."""
        return self.heldout >= self.target

    def metric(self, name: str) -> float:
        """A number of the newest step."""
        return self.latest.get(name, math.nan)

    def add(self, row: MetricRow) -> None:
        """Take one row of metrics.jsonl."""
        if row.kind == STEP:
            self.step, self.latest, self.phase = row.step, dict(row.values), "training"
        elif row.kind == EVAL:
            self.heldout = row.values["eval/reward"]
            if math.isnan(self.heldout_start):
                self.heldout_start = self.heldout

    def observe(self, fleet: Sequence[Heartbeat]) -> None:
        """Take the fleet's heartbeats, which are newer than the last step."""
        self.actors_alive = len(fleet)
        self.actor_tokens_per_s = sum(actor.tokens_per_s for actor in fleet)
