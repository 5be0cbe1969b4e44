"""The ranks but the first: no Redis, no fence, no metrics; their share of every step, publication and checkpoint."""

import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lambdapo_async.broker.interface import Descriptor
from lambdapo_async.config import RunConfig
from lambdapo_async.objective.advantage import group_confidence
from lambdapo_async.rollout import RolloutGroup
from learner.arrivals import ReceivedGroup
from learner.canary import canary_sequence, score
from learner.checkpoint import Checkpoint, write_share
from learner.crew import take_orders
from learner.parallel import Ranks
from learner.policy import Policy, pick_device
from learner.reference_policy import ReferencePolicy
from learner.trainer import ReferenceLogprobs, Trainer


@dataclass(frozen=True, slots=True)
class Origin:
    """What all ranks start from; rank 0 finds it, and verifies the checkpoint."""

    model_path: str
    """``model.path``, or the folder of the starter."""
    checkpoint: Checkpoint | None

    def share(self, ranks: Ranks) -> None:
        """Rank 0: tell the others."""
        folder = None if self.checkpoint is None else str(self.checkpoint.folder.resolve())
        ranks.share(json.dumps([self.model_path, folder]).encode())

    @classmethod
    def receive(cls, ranks: Ranks) -> "Origin":
        """The others: wait for rank 0, which may have a starter to build."""
        model_path, folder = json.loads(ranks.share(b""))
        return cls(model_path, None if folder is None else Checkpoint.open(Path(folder)))


def load_trainees(config: RunConfig, origin: Origin, ranks: Ranks) -> tuple[Policy, ReferenceLogprobs | None]:
    """On all ranks: the policy, restored from the checkpoint, and the reference that the KL term needs.

    Raises:
        ConfigError: a model that cannot be loaded or trained.
        CheckpointError: the checkpoint is of another model.
    """
    torch.manual_seed(config.seed)  # new adapters are drawn, and alike in whatever process a run begins
    device, temperature = pick_device(config.learner.device), config.sampling.temperature
    reference = None
    if config.objective.kl.coefficient > 0:
        # First: what it takes counts as taken in the policy's memory plan.
        reference = ReferencePolicy.load(
            origin.model_path, revision=config.model.revision, temperature=temperature, device=device, ranks=ranks
        )
    policy = Policy.load(
        origin.checkpoint.model_dir if origin.checkpoint else origin.model_path,
        revision=None if origin.checkpoint else config.model.revision,
        config=config.learner,
        temperature=temperature,
        device=device,
        ranks=ranks,
    )
    if origin.checkpoint is not None:
        origin.checkpoint.restore(policy, ranks)
    return policy, None if reference is None else reference.logprobs


class CrewMember:
    """``learner.crew.Duties`` with a policy."""

    def __init__(self, policy: Policy, trainer: Trainer, config: RunConfig, ranks: Ranks) -> None:
        self._policy, self._trainer, self._config, self._ranks = policy, trainer, config, ranks

    def train(self, groups: Sequence[RolloutGroup], *, version: int) -> None:
        """Take one step on this rank's share of ``groups``."""
        self._trainer.step([_received(group, self._config) for group in groups], version=version)

    def publish(self) -> None:
        """Join the gathering of all parameters; rank 0 gets them."""
        for _ in self._policy.named_bf16():
            pass

    def score(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> None:
        """Run the forward pass of one row of the canary; rank 0 has the same numbers."""
        score(self._policy, canary_sequence(prompt_ids, completion_ids))

    def save(self, folder: Path) -> None:
        """Write this rank's share of a checkpoint."""
        write_share(folder, self._policy, self._ranks)


def run_member(config: RunConfig, ranks: Ranks) -> None:
    """Do what rank 0 orders until the run is finished or suspended.

    Raises:
        RankLostError: rank 0 died or fell silent.
    """
    # torchrun hands signals to all ranks; rank 0 decides when to stop.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    policy, reference = load_trainees(config, Origin.receive(ranks), ranks)
    member = CrewMember(policy, Trainer(policy, config, reference, ranks), config, ranks)
    take_orders(ranks, member, vocab_size=policy.vocab_size)


def _received(group: RolloutGroup, config: RunConfig) -> ReceivedGroup:
    """The group as rank 0's ingest made it; where it lay in the stream is rank 0's alone to know."""
    confidence_G, num_missing = group_confidence(
        [each.behavior_logprobs for each in group.rollouts], config.objective.advantage.confidence
    )
    return ReceivedGroup(Descriptor("", 0, group.lease, group.min_version, 0, 0.0), group, confidence_G, num_missing)
