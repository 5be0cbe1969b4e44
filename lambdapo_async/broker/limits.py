"""What a run allows its queue and its actors to hold."""

from dataclasses import dataclass
from typing import Self

from lambdapo_async.config import RunConfig
from lambdapo_async.group_bytes import largest_group


@dataclass(frozen=True, slots=True)
class RunLimits:
    """What the queue and the admission gate hold the actors to."""

    max_staleness: int
    groups_per_step: int
    max_groups: int
    max_bytes: int
    group_bytes: int
    """Most bytes that an answer can have: a lease reserves as many."""
    lease_s: float

    @property
    def capacity(self) -> int:
        """Training leases that may be granted and not consumed."""
        return (self.max_staleness + 1) * self.groups_per_step

    @classmethod
    def of(cls, config: RunConfig) -> Self:
        """The limits that ``config`` asks for."""
        return cls(
            max_staleness=config.staleness.max_staleness,
            groups_per_step=config.rollout.groups_per_step,
            max_groups=config.broker.max_groups,
            max_bytes=config.broker.max_bytes,
            group_bytes=largest_group(config),
            lease_s=config.broker.lease_s,
        )
