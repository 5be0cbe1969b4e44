"""An actor's sign of life."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Heartbeat(BaseModel):
    """What an actor says of itself, every ``broker.heartbeat_s``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    actor_id: Annotated[str, Field(max_length=128)]
    host: Annotated[str, Field(max_length=256)]
    pid: int
    state: Literal["starting", "sampling", "quarantined", "draining"]
    device: Annotated[str, Field(max_length=128)]
    dtype: Annotated[str, Field(max_length=32)]
    engine: Annotated[str, Field(max_length=128)]
    """Engine name and version."""
    policy_version: int
    groups_in_flight: int
    groups_sent: int
    completions: int
    """Rollouts sampled since the start."""
    tokens: int
    """Completion tokens sampled since the start."""
    tokens_per_s: float
    """Over the last beats."""
    idle_share: Annotated[float, Field(ge=0.0, le=1.0)]
    """Share of the last ten seconds in which the engine held no request."""
    counters: Annotated[dict[str, float], Field(max_length=64)] = {}
    """Everything else worth a number: updates, pause seconds, scoring failures, late groups."""
    sent_at: float
    """Unix time in seconds."""
