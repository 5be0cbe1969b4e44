"""What the replay queue keeps, and for how long."""

from dataclasses import dataclass
from typing import Self

from lambdapo_async.config import RunConfig
from lambdapo_async.errors import LambdaPOError
from lambdapo_async.replay.rate_limiter import RateLimit


class ReplayError(LambdaPOError):
    """The replay queue cannot go on, or is not the one that a journal or checkpoint speaks of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayLimits:
    """What the queue keeps, and for how long."""

    rate: RateLimit
    max_uses: int
    """Steps that may train on one group; 1 is a plain stream in order of arrival."""
    max_groups: int
    max_bytes: int
    drop_above: int
    """Staleness in versions above which a group is dropped."""
    half_life: float
    """Versions after which a group's sampling weight has halved."""
    seed: int

    @classmethod
    def of(cls, config: RunConfig) -> Self:
        """The limits that ``config`` asks for; ``ValueError`` for limits that no queue could keep."""
        replay, groups = config.replay, config.rollout.groups_per_step
        least = max(float(groups), replay.samples_per_insert or 0.0)
        return cls(
            rate=RateLimit(
                groups_per_sample=groups,
                min_size=replay.min_size or groups,
                samples_per_insert=replay.samples_per_insert,
                error_buffer=replay.error_buffer or least,
            ),
            max_uses=replay.max_uses,
            max_groups=replay.max_groups,
            max_bytes=replay.max_bytes,
            drop_above=config.staleness.drop_above,
            half_life=replay.half_life,
            seed=config.seed,
        )

    def __post_init__(self) -> None:
        if self.max_uses < 1 or self.max_groups < self.rate.min_size or not self.half_life > 0.0:
            raise ValueError(
                f"max_uses = {self.max_uses} and half_life = {self.half_life:g} must be positive, and max_groups = "
                f"{self.max_groups} must hold min_size = {self.rate.min_size}"
            )
        ratio = self.rate.samples_per_insert
        if ratio is not None and (self.max_uses == 1 or ratio > self.max_uses):
            raise ValueError(
                f"samples_per_insert = {ratio:g} asks for more than max_uses = {self.max_uses} gives: raise max_uses "
                "(a plain stream takes no ratio)"
            )
