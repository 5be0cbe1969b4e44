"""How often, and for how long, the learner trains on a group."""

from pydantic import Field, PositiveFloat, PositiveInt

from lambdapo_async.config.sections import Section


class ReplayConfig(Section):
    """The replay queue between the arrivals and the steps (docs/decisions/0008); as it is, a plain stream."""

    max_uses: PositiveInt = 1
    """Steps that may train on one group; 1 takes groups once, in order of arrival."""
    samples_per_insert: float | None = Field(None, ge=1.0)
    """How often a group is trained on, on average; both sides wait to keep to it. Needs ``max_uses`` at or above it.
    None lets steps take what is there."""
    min_size: PositiveInt | None = None
    """Groups in the queue before the first step; None is ``rollout.groups_per_step``."""
    error_buffer: PositiveFloat | None = None
    """Samples by which ``samples_per_insert`` may be off before a side waits; None is the least that lets both go on:
    a step's groups, or ``samples_per_insert`` where that is more."""
    max_groups: PositiveInt = 4096
    """Groups in the queue."""
    max_bytes: PositiveInt = 2 * 1024**3
    """Payload bytes of the groups in the queue; what has arrived and is not in it may take a quarter more."""
    half_life: PositiveFloat = 4.0
    """Versions after which a group's chance to be drawn has halved; read with ``max_uses`` above 1."""
