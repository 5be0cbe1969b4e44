"""What arrived: decoded and judged once, and found the same when it is read from the journal again."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from lambdapo_async.broker.interface import Delivery, Descriptor
from lambdapo_async.config import RunConfig
from lambdapo_async.errors import WireFormatError
from lambdapo_async.journal.records import GroupRecord
from lambdapo_async.objective.advantage import estimate_advantages, group_confidence
from lambdapo_async.replay.bias import GroupShape
from lambdapo_async.replay.queue import ReplayEntry
from lambdapo_async.rollout import RolloutGroup
from lambdapo_async.seal import Seal
from lambdapo_async.wire import GROUP, decode_group

MALFORMED, ZERO_VARIANCE, QUARANTINED = "malformed", "zero_variance", "quarantined"

_ANY_VERSION = 2**62


@dataclass(frozen=True, slots=True, eq=False)
class ReceivedGroup:
    """A decoded group and what depends on nothing but it."""

    descriptor: Descriptor
    group: RolloutGroup
    confidence_G: NDArray[np.float64]
    """[G] float64 s_i of each rollout under the behavior policy."""
    num_missing_confidence: int


@dataclass(frozen=True, slots=True, eq=False)
class Arrival:
    """A journaled delivery on its way to the replay queue or the evaluation."""

    number: int
    """Of its journal record."""
    record: GroupRecord
    """Without its payload, which is decoded."""
    received: ReceivedGroup | None
    """None where the payload could not be read, or was not kept."""
    num_bytes: int
    """What it weighs in memory: its payload, of which the decoded columns are views."""

    @property
    def is_training(self) -> bool:
        """Whether it answers a training prompt."""
        return self.record.descriptor.lease.split == "train"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What :meth:`Screen.examine` found."""

    record: GroupRecord
    group: RolloutGroup | None
    problem: str
    """Why it is to be kept aside; empty if it is not."""


class Doorkeeper(Protocol):
    """Knows whose groups are wanted."""

    def welcomes(self, group: RolloutGroup) -> bool:
        """Whether ``group`` may be trained on."""


class Anybody:
    """A doorkeeper without suspicion."""

    def welcomes(self, group: RolloutGroup) -> bool:
        """Whether ``group`` may be trained on: it may."""
        del group
        return True


class Screen:
    """Decodes what arrives, and says which of it nothing can be learned from.

    Args:
        seal: what deliveries are signed with; the journal keeps what was inside.
        doorkeeper: asked at the first sight of a group. Its answer is in the journal, so nobody asks again.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        vocab_size: int,
        seal: Seal = Seal(None, run_id=""),  # noqa: B008 - without state
        doorkeeper: Doorkeeper = Anybody(),  # noqa: B008 - without state
    ) -> None:
        self._config, self._vocab_size = config, vocab_size
        self._seal, self._doorkeeper = seal, doorkeeper

    def examine(self, delivery: Delivery, *, newest_version: int) -> Verdict:
        """Judge a delivery that was never seen before.

        Args:
            newest_version: that an actor may have sampled with.
        """
        descriptor = delivery.descriptor
        try:
            payload = self._seal.open(delivery.payload, purpose=GROUP)
            group = decode_group(payload, vocab_size=self._vocab_size, max_version=newest_version)
            if group.lease != descriptor.lease:
                raise WireFormatError(f"payload answers {group.lease.id}, its entry {descriptor.lease.id}")  # noqa: TRY301
            check_fits_run(group, self._config)
        except WireFormatError as error:
            return Verdict(GroupRecord(descriptor, b"", MALFORMED), None, str(error))
        if not self._doorkeeper.welcomes(group):
            problem = f"its actor {group.actor_id} is set aside"
            return Verdict(GroupRecord(descriptor, b"", QUARANTINED), None, problem)
        discarded = ZERO_VARIANCE if group.lease.split == "train" and self._has_no_signal(group) else ""
        return Verdict(GroupRecord(descriptor, payload, discarded), group, "")

    def arrival(self, number: int, record: GroupRecord, group: RolloutGroup | None) -> Arrival:
        """The delivery under its number in the journal; ``group`` is dropped where the record has no payload."""
        received = None
        if group is not None and record.payload:
            confidence_G, num_missing = group_confidence(
                [rollout.behavior_logprobs for rollout in group.rollouts],
                kind=self._config.objective.advantage.confidence,
            )
            received = ReceivedGroup(record.descriptor, group, confidence_G, num_missing)
        return Arrival(number, GroupRecord(record.descriptor, b"", record.discarded), received, len(record.payload))

    def restore(self, number: int, record: GroupRecord) -> Arrival:
        """The delivery as it was before, from the journal.

        Raises:
            WireFormatError: it is of another model's vocabulary.
        """
        group = None
        if record.payload:
            group = decode_group(record.payload, vocab_size=self._vocab_size, max_version=_ANY_VERSION)
        return self.arrival(number, record, group)

    def entry(self, arrival: Arrival) -> ReplayEntry[ReceivedGroup]:
        """What the replay queue holds of a group to be trained on."""
        received = arrival.received
        assert received is not None, "a discarded arrival is never offered"
        return ReplayEntry(
            number=arrival.number,
            min_version=received.group.min_version,
            num_bytes=arrival.num_bytes,
            mass=self._advantage_mass(received),
            shape=shape_of(received.group),
            item=received,
        )

    def _advantage_mass(self, received: ReceivedGroup) -> float:
        """Sum of |advantage|, a pure function of the stored group: confidence under the behavior policy."""
        if self._config.replay.max_uses == 1:
            return 1.0  # a plain stream draws nothing
        rewards_1G, confidence_1G = (
            torch.tensor(received.group.rewards[None]),
            torch.tensor(received.confidence_G[None]),
        )
        return float(estimate_advantages(rewards_1G, confidence_1G, self._config.objective.advantage).abs().sum())

    def _has_no_signal(self, group: RolloutGroup) -> bool:
        return self._config.rollout.filter_zero_variance and bool(np.ptp(group.rewards) == 0.0)


def shape_of(group: RolloutGroup) -> GroupShape:
    """What the bias meter compares."""
    verifiable = [rollout.reward_parts["verifiable"] for rollout in group.rollouts]
    return GroupShape(
        length=max(rollout.num_tokens for rollout in group.rollouts), difficulty=1.0 - float(np.mean(verifiable))
    )


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
