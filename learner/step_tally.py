"""What a step's updates leave behind for its metrics: sums, and columns of its tokens."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lambdapo_async.fleet_health import FreshTokens
from lambdapo_async.objective.diagnostics import TokenDiagnostics, k3_divergence
from lambdapo_async.packing import MicroBatch
from learner.policy import TokenStatistics


@dataclass(slots=True)
class StepTally:
    """What the updates of a step add up to."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    """Stay on the device: nothing is read back before the step has ended."""
    group_numbers: dict[str, int] = field(default_factory=dict)
    """Group key -> its place in the step."""
    columns: list[Tensor] = field(default_factory=list)
    """Of each micro-batch five [K] float32 of its loss tokens: logprobs, behavior_logprobs, segment_ids, ages, and the
    group's place in the step (exact to 2^24)."""
    grad_norms: list[float] = field(default_factory=list)

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Add what one micro-batch contributes."""
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().double()

    def remember(self, statistics: TokenStatistics, columns: MicroBatch, *, version: int) -> None:
        """Keep what the diagnostics are made of."""
        mask_T, ages_T = columns.loss_mask_T, version - columns.token_versions_T
        numbers_N = torch.tensor([self.group_numbers.get(key, -1) for key in columns.group_keys], device=mask_T.device)
        groups_T = numbers_N[columns.segment_ids_T]
        kept = (statistics.logprobs_T, columns.behavior_logprobs_T, columns.segment_ids_T, ages_T, groups_T)
        self.columns += [column_T[mask_T].float() for column_T in kept]


def token_metrics(columns_of_shares: Sequence[Sequence[Tensor]]) -> dict[str, float]:
    """Diagnostics of the loss tokens of all shares, from each share's ``StepTally.columns``."""
    diagnostics = TokenDiagnostics()
    for columns in columns_of_shares:
        for logprobs_K, behavior_K, segments_K, ages_K, _ in _by_micro_batch(columns):
            mask_K = torch.ones(len(logprobs_K), dtype=torch.bool)
            diagnostics.add(logprobs_K, behavior_K, mask_K, segments_K.long(), ages_K.long())
    return diagnostics.finalise()


def fresh_by_group(columns_of_shares: Sequence[Sequence[Tensor]], num_groups: int) -> tuple[FreshTokens, ...]:
    """How far each group's engine is from the learner, over its tokens of the learner's own version."""
    sums_B2 = torch.zeros(num_groups, 2, dtype=torch.float64)
    for columns in columns_of_shares:
        for logprobs_K, behavior_K, _, ages_K, groups_K in _by_micro_batch(columns):
            fresh_K = ages_K == 0
            k3_K = k3_divergence(logprobs_K[fresh_K].double(), behavior_K[fresh_K].double())
            sums_B2.index_add_(0, groups_K[fresh_K].long(), torch.stack([torch.ones_like(k3_K), k3_K], dim=1))
    return tuple(FreshTokens(int(tokens), k3_sum) for tokens, k3_sum in sums_B2.tolist())


def _by_micro_batch(columns: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """A share's ``StepTally.columns``, five at a time."""
    return zip(*(columns[i::5] for i in range(5)), strict=True)
