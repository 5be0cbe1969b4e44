"""Sets actors aside that sample from another policy than the learner's, and takes them back after a passed canary."""

import logging
import threading
from collections.abc import Mapping, Sequence

import numpy as np

from lambdapo_async.broker.fleet_control import FleetControl
from lambdapo_async.broker.heartbeat import Heartbeat
from lambdapo_async.broker.interface import Fleet
from lambdapo_async.fleet_health import ActorHealth, FleetHealth, FreshTokens
from lambdapo_async.rollout import RolloutGroup
from learner.arrivals import ReceivedGroup

logger = logging.getLogger(__name__)

_CHECKS = "canary_checks"  # an actor's counter of comparisons that passed
MAX_SET_ASIDE = 4096
"""Remembered; of more, those set aside longest whose heartbeat is gone are forgotten: nobody else gets their ids."""


class FleetWatch:
    """Judges the fleet by its groups. :meth:`welcomes` may be called from any thread, the rest by the learner's loop.

    Nothing here is durable: a resumed learner finds in Redis who was set aside, and judges anew.
    """

    def __init__(self, control: FleetControl, fleet: Fleet) -> None:
        self._control, self._fleet = control, fleet
        self._lock = threading.Lock()
        self._health = FleetHealth()
        self._set_aside: dict[str, float | None] = {}  # actor -> passed canaries when it was set aside, once known
        self._has_adopted = False
        self._num_quarantines = self._num_readmitted = 0

    def welcomes(self, group: RolloutGroup) -> bool:
        """Whether ``group`` may be trained on; it is counted either way."""
        truncated = sum(rollout.finish_reason == "length" for rollout in group.rollouts)
        with self._lock:
            self._health.received(group.actor_id, num_rollouts=len(group.rollouts), num_truncated=truncated)
            return group.actor_id not in self._set_aside

    def trained(self, groups: Sequence[ReceivedGroup], fresh_by_group: Sequence[FreshTokens]) -> None:
        """A step was taken on ``groups``."""
        with self._lock:
            for received, fresh in zip(groups, fresh_by_group, strict=True):
                self._health.trained(received.group.actor_id, fresh)

    def tend(self) -> Sequence[Heartbeat]:
        """Set outliers aside and take back who has passed a canary since; the fleet's heartbeats.

        Raises:
            FencedError: another learner came.
            LostDataError, BrokerUnavailable: of Redis; call it again.
        """
        fleet = self._fleet.members()
        if not self._has_adopted:
            with self._lock:
                self._set_aside |= dict.fromkeys(self._control.quarantined())
            self._has_adopted = True
        self._set_outliers_aside({actor.actor_id: actor.counters.get(_CHECKS, 0.0) for actor in fleet})
        if self._set_aside:
            # Said again and again, since Redis may forget it.
            self._control.quarantine(self._set_aside)
            self._readmit(fleet)
            self._forget_the_dead(fleet)
        return fleet

    def tend_if_needed(self) -> None:
        """While no step is due: whoever waits to be taken back may be the one that the step waits for."""
        if self._set_aside or not self._has_adopted:
            self.tend()

    def metrics(self) -> dict[str, float]:
        """For a step's row."""
        with self._lock:
            actors = list(self._health.actors().values())
            num_aside = len(self._set_aside)
        return {
            "actors/quarantined": num_aside,
            "actors/quarantines": self._num_quarantines,
            "actors/readmitted": self._num_readmitted,
            "actors/mismatch_max": _largest([actor.mismatch for actor in actors]),
            "actors/mismatch_median": _median([actor.mismatch for actor in actors]),
            "actors/acceptance_min": -_largest([-actor.acceptance for actor in actors]),
            "actors/truncated_max": _largest([actor.truncated for actor in actors]),
        }

    def actors(self) -> Mapping[str, ActorHealth]:
        """What is known of each actor."""
        with self._lock:
            return self._health.actors()

    def _set_outliers_aside(self, checks: Mapping[str, float]) -> None:
        with self._lock:
            known = self._health.actors()
            for actor_id in self._health.outliers():
                if actor_id in self._set_aside:
                    continue
                self._set_aside[actor_id] = checks.get(actor_id)
                self._num_quarantines += 1
                logger.warning(
                    "actor %s is set aside until it passes a canary: its log-probabilities are %.3g nats (k3) from the "
                    "learner's at staleness 0",
                    actor_id, known[actor_id].mismatch,
                )  # fmt: skip

    def _readmit(self, fleet: Sequence[Heartbeat]) -> None:
        passed = []
        with self._lock:
            for actor in fleet:
                if actor.actor_id not in self._set_aside:
                    continue
                checks, before = actor.counters.get(_CHECKS, 0.0), self._set_aside[actor.actor_id]
                if before is None:
                    self._set_aside[actor.actor_id] = checks
                elif checks > before:
                    passed.append(actor.actor_id)
        if not passed:
            return
        self._control.readmit(passed)
        with self._lock:
            for actor_id in passed:
                del self._set_aside[actor_id]
                self._health.forget(actor_id)
        self._num_readmitted += len(passed)
        logger.info("taken back after a passed canary: %s", ", ".join(passed))

    def _forget_the_dead(self, fleet: Sequence[Heartbeat]) -> None:
        surplus = len(self._set_aside) - MAX_SET_ASIDE
        if surplus <= 0:
            return
        alive = {actor.actor_id for actor in fleet}
        dead = [actor_id for actor_id in self._set_aside if actor_id not in alive][:surplus]
        self._control.readmit(dead)
        with self._lock:
            for actor_id in dead:
                del self._set_aside[actor_id]
                self._health.forget(actor_id)


def _largest(values: Sequence[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return max(known, default=float("nan"))


def _median(values: Sequence[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.median(known)) if known else float("nan")
