"""What an actor is put together from."""

from collections.abc import Callable
from dataclasses import dataclass

from actors.canary import ActorCanary
from actors.engine import InferenceEngine
from actors.follower import WeightFollower
from actors.handoff import Handoff
from actors.outbox import Outbox
from actors.prompts import LeasedPrompts
from actors.scoring import Scorer
from lambdapo_async.broker.interface import Admission, Fleet, RunStore
from lambdapo_async.config import RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorParts:
    """Everything an actor is put together from."""

    actor_id: str
    config: RunConfig
    engine: InferenceEngine
    follower: WeightFollower
    canary: ActorCanary
    prompts: LeasedPrompts
    scorer: Scorer
    outbox: Outbox
    handoff: Handoff
    orphans: tuple[Outbox, ...]
    """What dead actors of this run left on this machine."""
    admission: Admission
    fleet: Fleet
    run_store: RunStore
    hurry: Callable[[], None]
    """From now on no call waits long for Redis: we are leaving."""
