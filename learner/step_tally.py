"""What a step's updates leave behind for its metrics: sums, on the device until the step has ended."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lambdapo_async.fleet_health import FreshTokens
from lambdapo_async.objective.diagnostics import TokenDiagnostics, k3_divergence, token_metrics
from lambdapo_async.packing import MicroBatch
from learner.parallel import Ranks
from learner.policy import TokenStatistics


@dataclass(slots=True)
class StepTally:
    """What the updates of a step add up to; what reads it waits for the device."""

    group_numbers: Mapping[str, int]
    """Group key -> its place in the step."""
    keeps_contexts: bool
    """``actor.stale_kv``: a token's context is of all versions that sampled its rollout, and not of the token's own."""
    grad_norms: list[float] = field(default_factory=list)
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _diagnostics: TokenDiagnostics = field(default_factory=TokenDiagnostics)
    _fresh_B3: Tensor | None = None
    """float64 ``FreshTokens`` of each group."""

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Add what one micro-batch contributes: scalars by name."""
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().double()

    def count(
        self, statistics: TokenStatistics, columns: MicroBatch, *, version: int, start_logprobs_T: Tensor | None
    ) -> None:
        """Take one micro-batch into the diagnostics; all lie on one device.

        Args:
            start_logprobs_T: [T] log pi of the step's start, once for each micro-batch: engines are held against the
                weights they were given. None is left out of that.
        """
        logprobs_T, behavior_T, mask_T = statistics.logprobs_T, columns.behavior_logprobs_T, columns.loss_mask_T
        ages_T = version - columns.token_versions_T
        self._diagnostics.add(logprobs_T, behavior_T, mask_T, columns.segment_ids_T, ages_T)
        if start_logprobs_T is not None:
            self._count_fresh(start_logprobs_T, ages_T, columns)

    def _count_fresh(self, start_logprobs_T: Tensor, ages_T: Tensor, columns: MicroBatch) -> None:
        fresh_T = columns.loss_mask_T & (ages_T == 0)
        if self.keeps_contexts:
            fresh_T &= _oldest(ages_T, columns) == 0
        k3_T = torch.where(fresh_T, k3_divergence(start_logprobs_T, columns.behavior_logprobs_T), 0.0)
        gap_T = torch.where(fresh_T, start_logprobs_T.double() - columns.behavior_logprobs_T, 0.0)
        # A filler's rollouts are of no group of the step; they have no loss either.
        numbers_N = torch.tensor([self.group_numbers.get(key, 0) for key in columns.group_keys])
        groups_T = numbers_N.to(fresh_T.device, non_blocking=True)[columns.segment_ids_T]
        if self._fresh_B3 is None:
            self._fresh_B3 = k3_T.new_zeros(len(self.group_numbers), 3)
        self._fresh_B3.index_add_(0, groups_T, torch.stack([fresh_T.double(), k3_T, gap_T.abs()], dim=1))

    def sums(self, ranks: Ranks) -> dict[str, float]:
        """On all ranks: name -> sum of what was added, over the shares."""
        values = torch.stack(list(self._sums.values())).tolist()
        return ranks.add_up(dict(zip(self._sums, values, strict=True)))

    def token_metrics(self, ranks: Ranks) -> dict[str, float]:
        """On all ranks: the diagnostics of the loss tokens of all shares."""
        largest = ranks.collect([torch.tensor([self._diagnostics.abs_log_max()])])
        return token_metrics(ranks.add_up(self._diagnostics.sums()), max(float(share[0]) for share in largest))

    def fresh_by_group(self, ranks: Ranks) -> tuple[FreshTokens, ...]:
        """On all ranks: how far each group's engine is from the learner, over its tokens of the learner's version."""
        assert self._fresh_B3 is not None, "every share has a micro-batch in the first update"
        rows: list[list[float]] = self._fresh_B3.tolist()
        total = ranks.add_up(
            {f"{number}.{column}": value for number, row in enumerate(rows) for column, value in enumerate(row)}
        )
        return tuple(
            FreshTokens(int(total[f"{number}.0"]), total[f"{number}.1"], total[f"{number}.2"])
            for number in range(len(rows))
        )


def _oldest(ages_T: Tensor, columns: MicroBatch) -> Tensor:
    """[T] int64 largest age of a token of the same rollout; there are no more rollouts than tokens."""
    sampled_T = torch.where(columns.loss_mask_T, ages_T, 0)
    oldest_N = torch.zeros_like(ages_T).scatter_reduce(0, columns.segment_ids_T, sampled_T, "amax")
    return oldest_N[columns.segment_ids_T]
