"""A group between the engine and the queue."""

from collections.abc import Sequence
from dataclasses import dataclass

from actors.engine import Completion
from actors.prompts import Prompt
from lambdapo_async.rollout import Lease, Rollout, RolloutGroup, Timing
from lambdapo_async.tasks.interface import Scored


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sampled:
    """A group as its engine returned it, before it is rewarded."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    started_at: float
    """Unix time in seconds at which its first actor began."""
    generation_s: float
    """Seconds in engines, those of earlier actors included."""

    @property
    def is_cut_off(self) -> bool:
        """Whether a completion did not end by itself."""
        return any(completion.finish_reason == "abort" for completion in self.completions)

    @property
    def num_tokens(self) -> int:
        """Completion tokens."""
        return sum(len(completion.token_ids) for completion in self.completions)

    def unrewarded(self, lease: Lease, actor_id: str) -> RolloutGroup:
        """On the wire, what was cut off is a group without texts and rewards."""
        nothing = [Scored(0.0, {}) for _ in self.completions]
        return self.rewarded(lease, actor_id, [""] * len(self.completions), nothing, scoring_s=0.0)

    def rewarded(
        self, lease: Lease, actor_id: str, texts: Sequence[str], scores: Sequence[Scored], *, scoring_s: float
    ) -> RolloutGroup:
        """The finished group; ``texts`` and ``scores`` are those of the completions, in order."""
        rollouts = tuple(
            Rollout(
                completion_ids=completion.token_ids,
                behavior_logprobs=completion.logprobs,
                version_spans=completion.version_spans,
                finish_reason=completion.finish_reason,
                text=text,
                reward=scored.reward,
                reward_parts=scored.parts,
            )
            for completion, text, scored in zip(self.completions, texts, scores, strict=True)
        )
        return RolloutGroup(
            lease=lease,
            prompt_ids=self.prompt.token_ids,
            rollouts=rollouts,
            actor_id=actor_id,
            timing=Timing(started_at=self.started_at, generation_s=self.generation_s, scoring_s=scoring_s),
        )
