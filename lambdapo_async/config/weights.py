"""How policy versions reach the actors."""

from pydantic import Field, NonNegativeFloat, PositiveInt

from lambdapo_async.config.sections import Section

REDIS = "redis"
"""The store that keeps everything in Redis."""


class WeightsConfig(Section):
    """What is published of each version, where it lies and how long."""

    store: str = Field(REDIS, pattern=r"^(redis|[a-z0-9+.-]+://.+)$")
    """``redis``, or the fsspec URL of a folder that learner and actors reach (``file:///shared/weights``,
    ``s3://bucket/weights``); its credentials come from the environment. Redis then holds names and the head only."""
    max_redis_bytes: PositiveInt = 4 * 1024**3
    """Bytes of weights in Redis; at least twice a compressed model, so that a keyframe can be replaced."""
    union_every: PositiveInt = 8
    """Versions between two union files, which lead from any version since the keyframe."""
    keyframe_share: float = Field(0.25, gt=0.0, le=1.0)
    """A new keyframe instead of a union once this share of the elements changed since the last one; and a union at
    the latest when the steps since the last one take this share of the keyframe's bytes."""
    grace_s: NonNegativeFloat = 60.0
    """Seconds that a file stays after nobody needs it any more, for readers who are about to fetch it."""

    @property
    def budget_bytes(self) -> int | None:
        """What payloads may take; None where they are not in Redis."""
        return self.max_redis_bytes if self.store == REDIS else None
