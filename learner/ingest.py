"""Reads the rollout queue on a thread, so that decoding never waits for a step nor a step for Redis."""

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lambdapo_async.broker.interface import Delivery, Descriptor, RolloutSource
from lambdapo_async.config import RunConfig
from lambdapo_async.errors import WireFormatError
from lambdapo_async.objective.advantage import group_confidence
from lambdapo_async.rollout import RolloutGroup
from lambdapo_async.wire import decode_group

logger = logging.getLogger(__name__)

_READ_WAIT_S = 0.5


@dataclass(frozen=True, slots=True, eq=False)
class ReceivedGroup:
    """A decoded group and what depends on nothing but it."""

    descriptor: Descriptor
    group: RolloutGroup
    confidence_G: NDArray[np.float64]
    """[G] float64 s_i of each rollout under the behavior policy."""
    num_missing_confidence: int


@dataclass(frozen=True, slots=True)
class Discarded:
    """A delivery that will not be trained on."""

    descriptor: Descriptor
    reason: str
    group: RolloutGroup | None
    """None when it could not be decoded."""


class Ingest:
    """A bounded hand-over from Redis to the loop. ``get`` re-raises what the thread died of."""

    def __init__(
        self, source: RolloutSource, config: RunConfig, *, vocab_size: int, newest_version: Callable[[], int]
    ) -> None:
        self._source, self._config = source, config
        self._vocab_size, self._newest_version = vocab_size, newest_version
        self._step_groups = config.rollout.groups_per_step
        capacity = (config.staleness.max_staleness + 2) * self._step_groups
        self._received: queue.Queue[ReceivedGroup | Discarded | BaseException] = queue.Queue(capacity)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._read_until_stopped, name="ingest", daemon=True)

    def start(self) -> None:
        """Begin to read; the source must be initialised."""
        self._thread.start()

    def get(self, *, timeout_s: float) -> ReceivedGroup | Discarded | None:
        """The next delivery in order of arrival, or None after ``timeout_s``."""
        try:
            received = self._received.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(received, BaseException):
            raise received
        return received

    def close(self) -> None:
        """Stop reading; what was handed over but not taken is read again by the next learner."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2 * self._config.broker.timeout_s)

    def _read_until_stopped(self) -> None:
        try:
            while not self._stopping.is_set():
                for delivery in self._source.read(self._step_groups, timeout_s=_READ_WAIT_S):
                    self._hand_over(self._receive(delivery))
        except BaseException as error:  # noqa: BLE001 - carried to the loop, which raises it
            self._hand_over(error)

    def _hand_over(self, received: ReceivedGroup | Discarded | BaseException) -> None:
        while not self._stopping.is_set():
            try:
                self._received.put(received, timeout=_READ_WAIT_S)
            except queue.Full:
                continue
            return

    def _receive(self, delivery: Delivery) -> ReceivedGroup | Discarded:
        descriptor = delivery.descriptor
        try:
            group = self._decode(delivery)
        except WireFormatError as error:
            logger.warning("quarantined group %s of %s: %s", descriptor.seq, descriptor.producer, error)
            self._source.quarantine(descriptor, delivery.payload, str(error))
            return Discarded(descriptor, "malformed", None)
        if group.lease.split == "train" and self._has_no_signal(group):
            return Discarded(descriptor, "zero_variance", group)
        confidence_G, num_missing = group_confidence(
            [rollout.behavior_logprobs for rollout in group.rollouts],
            kind=self._config.objective.advantage.confidence,
        )
        return ReceivedGroup(descriptor, group, confidence_G, num_missing)

    def _decode(self, delivery: Delivery) -> RolloutGroup:
        group = decode_group(delivery.payload, vocab_size=self._vocab_size, max_version=self._newest_version())
        if group.lease != delivery.descriptor.lease:
            raise WireFormatError(f"payload answers {group.lease.id}, its entry {delivery.descriptor.lease.id}")
        check_fits_run(group, self._config)
        return group

    def _has_no_signal(self, group: RolloutGroup) -> bool:
        return self._config.rollout.filter_zero_variance and bool(np.ptp(group.rewards) == 0.0)


def check_fits_run(group: RolloutGroup, config: RunConfig) -> None:
    """``WireFormatError`` unless ``group`` is an answer that this run could have asked for."""
    num_rollouts = len(group.rollouts)
    wanted = config.rollout.group_size if group.lease.split == "train" else 1
    if num_rollouts != wanted:
        raise WireFormatError(f"{group.lease.id} has {num_rollouts} rollouts, this run asks for {wanted}")
    longest = max(rollout.num_tokens for rollout in group.rollouts)
    total = len(group.prompt_ids) + longest
    if longest > config.sampling.max_tokens or total > config.model.max_length:
        raise WireFormatError(
            f"{group.lease.id} has a completion of {longest} tokens, with its prompt {total}; this run allows "
            f"{config.sampling.max_tokens} and {config.model.max_length}"
        )
    if any("verifiable" not in rollout.reward_parts for rollout in group.rollouts):
        raise WireFormatError(f"{group.lease.id} lacks the reward part 'verifiable'")
    if group.lease.split == "heldout" and group.lease.index >= config.evaluation.num_prompts:
        raise WireFormatError(f"{group.lease.id} is none of the {config.evaluation.num_prompts} held-out prompts")
