"""Whose run it is: the fence in Redis, raised by each learner that takes over."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

from lambdapo_async.broker.client import Broker
from lambdapo_async.broker.round_trip import Argument
from lambdapo_async.broker.script import Script
from lambdapo_async.keys import RunKeys


@dataclass(frozen=True, slots=True)
class Ownership:
    """Takes the run over for one process."""

    broker: Broker
    keys: RunKeys
    owner: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Tells two learners with the same fence apart: fences are counted per output folder, not per Redis."""

    def take_over(self, fence: int, fields: Mapping[str, Argument]) -> None:
        """Raise the run's fence and set ``fields`` of its state; the epoch is made where there is none.

        Raises:
            FencedError: the run has a larger fence, or the same one of another owner.
        """
        new_epoch = uuid.uuid4().hex[:16]
        flat = [argument for pair in fields.items() for argument in pair]
        Script(self.broker, "take_over")([self.keys.state], [fence, self.owner, new_epoch, *flat])
