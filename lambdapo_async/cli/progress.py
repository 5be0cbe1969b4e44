"""What is known of a running run, gathered from its metrics and its fleet."""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lambdapo_async.broker.heartbeat import Heartbeat
from lambdapo_async.metrics import EVAL, STEP, MetricRow

_WINDOW_S = 10.0
"""Actors count tokens when a whole group is done, so a rate over one heartbeat is mostly 0."""


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
    _sampled: deque[tuple[float, dict[str, int]]] = field(default_factory=deque)
    """(when, actor id -> tokens sampled since it started), oldest first."""

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
        now, sampled = self.clock(), {actor.actor_id: actor.tokens for actor in fleet}
        self._sampled.append((now, sampled))
        while now - self._sampled[0][0] > _WINDOW_S:
            self._sampled.popleft()
        since, before = self._sampled[0]
        gained = sum(tokens - before.get(actor_id, 0) for actor_id, tokens in sampled.items())
        self.actor_tokens_per_s = gained / (now - since) if now > since else 0.0
        self.actors_alive = len(fleet)
