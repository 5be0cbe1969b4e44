"""What arrived since the last step, as sums: thousands of discarded groups take no memory."""

from collections import Counter

import numpy as np

from lambdapo_async.rollout import RolloutGroup


class ArrivalTally:
    """Sums over rollouts and groups."""

    def __init__(self) -> None:
        self._sums: Counter[str] = Counter()
        self._rewards: dict[str, tuple[float, int]] = {}
        self.num_groups = 0

    def add(self, group: RolloutGroup) -> None:
        """One training group that could be read, whatever becomes of it."""
        self.num_groups += 1
        self._sums["unanimous"] += bool(np.ptp(group.rewards) == 0.0)
        for rollout in group.rollouts:
            self._sums["rollouts"] += 1
            self._sums["tokens"] += rollout.num_tokens
            self._sums["truncated"] += rollout.finish_reason == "length"
            # Last, for a function of the user's may be called as we call the whole.
            for name, reward in [*rollout.reward_parts.items(), ("mean", rollout.reward)]:
                total, count = self._rewards.get(name, (0.0, 0))
                self._rewards[name] = (total + reward, count + 1)

    def metrics(self) -> dict[str, float]:
        """Means over everything that arrived, so that filtering does not colour the curve; NaN if nothing did."""
        rollouts = self._sums["rollouts"]
        rewards = {f"reward/{name}": total / count for name, (total, count) in sorted(self._rewards.items())}
        return {
            "reward/mean": float("nan"),
            **rewards,
            "rollout/length": _share(self._sums["tokens"], rollouts),
            "rollout/truncated": _share(self._sums["truncated"], rollouts),
            "frac_reward_zero_std": _share(self._sums["unanimous"], self.num_groups),
        }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
