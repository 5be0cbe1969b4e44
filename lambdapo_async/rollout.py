"""The message of the system: a rollout group, whole or not at all.

C = completion tokens of one rollout, P = prompt tokens, G = group size.
All columns of a rollout share the length C.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lambdapo_async.errors import WireFormatError

FinishReason = Literal["stop", "length", "abort"]
Split = Literal["train", "heldout"]
TokenIds = NDArray[np.int32]
LogProbs = NDArray[np.float32]

FINISH_REASONS: tuple[FinishReason, ...] = get_args(FinishReason)
SPLITS: tuple[Split, ...] = get_args(Split)


def _freeze(array: np.ndarray, dtype: type[np.generic]) -> np.ndarray:
    """A read-only, contiguous view of ``array`` in the wire's ``dtype``."""
    frozen = np.ascontiguousarray(array, dtype=dtype).view()
    frozen.setflags(write=False)
    return frozen


@dataclass(frozen=True, slots=True)
class Lease:
    """The right and the duty to answer one prompt."""

    split: Split
    index: int
    """``train``: position in the endless, epoch-wise shuffled order; ``heldout``: row of the held-out rows."""
    round: int = 0
    """``heldout``: the learner step whose evaluation this is; 0 for ``train``."""

    def __post_init__(self) -> None:
        if self.split not in SPLITS or self.index < 0 or self.round < 0:
            raise WireFormatError(f"no such lease: split={self.split!r} index={self.index} round={self.round}")

    @property
    def id(self) -> str:
        """The lease's name in Redis."""
        return f"{self.split}:{self.round}:{self.index}"

    @classmethod
    def from_id(cls, lease_id: str) -> "Lease":
        """Inverse of :attr:`id`; ``WireFormatError`` for anything else."""
        try:
            split, round_, index = lease_id.split(":")
            return cls(split, int(index), int(round_))  # type: ignore[arg-type]
        except ValueError as error:
            raise WireFormatError(f"no such lease id: {lease_id[:80]!r}") from error


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """``num_tokens`` consecutive completion tokens sampled under ``policy_version``."""

    policy_version: int
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rollout:
    """One sampled completion, exactly as the behavior policy produced it."""

    completion_ids: TokenIds
    """[C] int32 sampled token ids, end-of-sequence included when it was sampled."""
    behavior_logprobs: LogProbs
    """[C] float32 natural log of mu(token), after temperature (vLLM's processed log-probabilities)."""
    version_spans: tuple[VersionSpan, ...]
    """Run lengths of the policy version per token, oldest first; their sum is C."""
    finish_reason: FinishReason
    text: str
    """The completion decoded without special tokens; what the reward saw."""
    reward: float
    """R: what the learner trains on (verifiable reward and density combined)."""
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    """By name, always with ``verifiable`` (V, what evaluation reports); ``density`` when it was computed."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "completion_ids", _freeze(self.completion_ids, np.int32))
        object.__setattr__(self, "behavior_logprobs", _freeze(self.behavior_logprobs, np.float32))
        tokens, logprobs = self.completion_ids.shape, self.behavior_logprobs.shape
        if len(tokens) != 1 or tokens != logprobs:
            raise WireFormatError(f"completion_ids {tokens} and behavior_logprobs {logprobs} must be one length")
        spanned = sum(span.num_tokens for span in self.version_spans)
        if spanned != tokens[0] or any(s.num_tokens < 1 or s.policy_version < 0 for s in self.version_spans):
            raise WireFormatError(f"version spans cover {spanned} of {tokens[0]} completion tokens")
        if not np.isfinite(self.behavior_logprobs).all() or (self.behavior_logprobs > 0).any():
            raise WireFormatError("behavior_logprobs must be finite and <= 0")
        if self.finish_reason not in FINISH_REASONS:
            raise WireFormatError(f"finish_reason {self.finish_reason!r} is none of {FINISH_REASONS}")
        if not np.isfinite([self.reward, *self.reward_parts.values()]).all():
            raise WireFormatError(f"rewards must be finite, got {self.reward} from {dict(self.reward_parts)}")

    @property
    def num_tokens(self) -> int:
        """C, the completion's length."""
        return int(self.completion_ids.shape[0])

    @property
    def token_versions(self) -> NDArray[np.int64]:
        """[C] int64 policy version of each token."""
        versions = [span.policy_version for span in self.version_spans]
        return np.repeat(np.array(versions, np.int64), [span.num_tokens for span in self.version_spans])


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Where a group's seconds went, on the actor's clock."""

    started_at: float
    """Unix time in seconds at which sampling started."""
    generation_s: float
    scoring_s: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RolloutGroup:
    """All G rollouts of one leased prompt."""

    lease: Lease
    prompt_ids: TokenIds
    """[P] int32"""
    rollouts: tuple[Rollout, ...]
    actor_id: str
    timing: Timing

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_ids", _freeze(self.prompt_ids, np.int32))
        if not self.rollouts:
            raise WireFormatError(f"group {self.lease.id} holds no rollout")
        if self.prompt_ids.ndim != 1 or self.prompt_ids.shape[0] == 0:
            raise WireFormatError(f"group {self.lease.id} has prompt ids of shape {self.prompt_ids.shape}")

    @property
    def min_version(self) -> int:
        """Oldest policy version that produced any token of the group."""
        return min((s.policy_version for r in self.rollouts for s in r.version_spans), default=0)

    @property
    def max_version(self) -> int:
        """Newest policy version that produced any token of the group."""
        return max((s.policy_version for r in self.rollouts for s in r.version_spans), default=0)

    @property
    def num_completion_tokens(self) -> int:
        """Sum of C over the group."""
        return sum(rollout.num_tokens for rollout in self.rollouts)

    @property
    def rewards(self) -> NDArray[np.float64]:
        """[G] float64 R of each rollout."""
        return np.array([rollout.reward for rollout in self.rollouts], np.float64)
