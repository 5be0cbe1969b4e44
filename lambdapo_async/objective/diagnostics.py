"""What every step reports about its data, under stable names; ``alarms.py`` says what of it is alarming.

T = packed tokens of a micro-batch, K = those of them with loss, N = its sequences with loss, B = groups, G = rollouts
of a group.

=========================  ============================================================================
``ratio/ess_token``        effective sample size of pi/mu over tokens, divided by their number: 1 is on-policy
``ratio/ess_sequence``     the same over sequences, with the product of a sequence's ratios
``mismatch_kl``            k3 estimate of KL(mu || pi), nats per token
``ratio/log_mean``         mean log pi - log mu of a token, nats; negative where the policy left what was sampled
``ratio/abs_log_mean``     mean and largest abs(log pi - log mu) of a token, nats
``ratio/abs_log_max``
``staleness/share_<age>``  share of the tokens sampled so many versions before the step: 0, 1, 2, 3, 4-7, 8+
``advantage/shift``        mean advantage
``advantage/abs_mean``     mean abs(advantage)
``confidence/reward_corr`` correlation of s and R inside groups, averaged over groups where both vary
``frac_reward_zero_std``   share of the groups whose rewards are all equal
``density/value_corr``     correlation of density and V over the rollouts that have a density; absent where either is
                           the same in all
=========================  ============================================================================
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from lambdapo_async.objective.policy_loss import MAX_LOG_RATIO

AGE_BUCKETS: Mapping[str, int] = MappingProxyType({"0": 0, "1": 1, "2": 2, "3": 3, "4_7": 4, "8_up": 8})
"""Name -> youngest age in versions; the oldest is just below the next one's."""


class TokenDiagnostics:
    """Sums over the micro-batches of a step, on their device; nobody waits for it before :meth:`sums`."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._sums_M: Tensor | None = None
        self._abs_log_max: Tensor | None = None

    def add(
        self,
        logprobs_T: Tensor,
        behavior_logprobs_T: Tensor,
        loss_mask_T: Tensor,
        segment_ids_T: Tensor,
        ages_T: Tensor,
    ) -> None:
        """Count one micro-batch.

        Args:
            logprobs_T: [T] float32 log pi without gradient; ignored where masked.
            behavior_logprobs_T: [T] float32 log mu; ignored where masked.
            loss_mask_T: [T] bool.
            segment_ids_T: [T] int64 number of the token's sequence, 0..N-1.
            ages_T: [T] int64 versions between the one that sampled the token and the step's.
        """
        # Masks weigh and nothing is selected: how much would be is known on the device alone.
        log_ratio_T = torch.where(loss_mask_T, logprobs_T.double() - behavior_logprobs_T, 0)
        mask_T, abs_log_T = loss_mask_T.double(), log_ratio_T.abs()
        # There are no more sequences than tokens; one without a loss token is no sample.
        zeros_N = torch.zeros_like(log_ratio_T)
        has_loss_N = (zeros_N.index_add(0, segment_ids_T, mask_T) > 0).double()
        ratio_T = _ratio(log_ratio_T) * mask_T
        ratio_N = _ratio(zeros_N.index_add(0, segment_ids_T, log_ratio_T)) * has_loss_N
        columns = {
            "tokens": mask_T,
            "ratio": ratio_T,
            "ratio_squared": ratio_T.square(),
            "k3": _k3(log_ratio_T),
            "log": log_ratio_T,
            "abs_log": abs_log_T,
            "sequences": has_loss_N,
            "sequence_ratio": ratio_N,
            "sequence_ratio_squared": ratio_N.square(),
            **{f"at_least_{name}": (ages_T >= youngest) * mask_T for name, youngest in AGE_BUCKETS.items()},
        }
        sums_M = torch.stack([column.sum() for column in columns.values()])
        abs_log_max = abs_log_T.max()
        self._names = tuple(columns)
        self._sums_M = sums_M if self._sums_M is None else self._sums_M + sums_M
        if self._abs_log_max is not None:
            abs_log_max = torch.maximum(self._abs_log_max, abs_log_max)
        self._abs_log_max = abs_log_max

    def sums(self) -> dict[str, float]:
        """Name -> sum over everything added, for :func:`token_metrics`; those of several ranks add up."""
        return {} if self._sums_M is None else dict(zip(self._names, self._sums_M.tolist(), strict=True))

    def abs_log_max(self) -> float:
        """Largest abs(log pi - log mu) of a loss token, in nats; 0 without one."""
        return 0.0 if self._abs_log_max is None else float(self._abs_log_max)


def token_metrics(sums: Mapping[str, float], abs_log_max: float) -> dict[str, float]:
    """Metric name -> value from :class:`TokenDiagnostics`' sums and maximum; empty when no token was added."""
    tokens = sums.get("tokens", 0.0)
    if tokens == 0:
        return {}
    at_least = [sums[f"at_least_{name}"] for name in AGE_BUCKETS]
    return {
        "ratio/ess_token": sums["ratio"] ** 2 / sums["ratio_squared"] / tokens,
        "ratio/ess_sequence": sums["sequence_ratio"] ** 2 / sums["sequence_ratio_squared"] / sums["sequences"],
        "mismatch_kl": sums["k3"] / tokens,
        "ratio/log_mean": sums["log"] / tokens,
        "ratio/abs_log_mean": sums["abs_log"] / tokens,
        "ratio/abs_log_max": abs_log_max,
        **{
            f"staleness/share_{name}": (older - oldest) / tokens
            for name, older, oldest in zip(AGE_BUCKETS, at_least, [*at_least[1:], 0.0], strict=True)
        },
    }


def k3_divergence(logprobs_K: Tensor, behavior_logprobs_K: Tensor) -> Tensor:
    """[K] float64 k3 estimates of KL(mu || pi) in nats, ratio - 1 - log ratio with ratio pi / mu; never negative."""
    return _k3(logprobs_K.double() - behavior_logprobs_K)


def group_diagnostics(rewards_BG: Tensor, confidence_BG: Tensor, advantages_BG: Tensor) -> dict[str, float]:
    """Metric name -> value over the groups of one step; all three are [B, G] float64."""
    if rewards_BG.numel() == 0:
        return {}
    varied_B = rewards_BG.amax(dim=1) > rewards_BG.amin(dim=1)
    metrics = {
        "advantage/shift": float(advantages_BG.mean()),
        "advantage/abs_mean": float(advantages_BG.abs().mean()),
        "frac_reward_zero_std": 1.0 - float(varied_B.double().mean()),
    }
    both_B = varied_B & (confidence_BG.amax(dim=1) > confidence_BG.amin(dim=1))
    if both_B.any():
        correlation_B = _correlation(confidence_BG[both_B], rewards_BG[both_B])
        metrics["confidence/reward_corr"] = float(correlation_B.mean())
    return metrics


def density_diagnostics(verifiable_N: Sequence[float], density_N: Sequence[float]) -> dict[str, float]:
    """Correlation of V and density over N rollouts; empty where either is the same in all."""
    if len(verifiable_N) < 2 or min(np.ptp(verifiable_N), np.ptp(density_N)) == 0:
        return {}
    return {"density/value_corr": float(np.corrcoef(verifiable_N, density_N)[0, 1])}


def _k3(log_ratio: Tensor) -> Tensor:
    return _ratio(log_ratio) - 1 - log_ratio


def _ratio(log_ratio: Tensor) -> Tensor:
    return torch.exp(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


def _correlation(x_BG: Tensor, y_BG: Tensor) -> Tensor:
    """[B] Pearson correlation of each row; both rows vary."""
    x_BG, y_BG = (each - each.mean(dim=1, keepdim=True) for each in (x_BG, y_BG))
    return torch.nn.functional.cosine_similarity(x_BG, y_BG, dim=1)
