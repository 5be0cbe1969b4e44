"""AdamW on float32 masters, beside the model or in the host's memory."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lambdapo_async.config.learner import LearnerConfig
from lambdapo_async.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""What AdamW keeps per parameter."""


class MasterOptimizer:
    """Fused AdamW on the trained parameters.

    With ``learner.optimizer_offload`` the masters and their moments lie in the host's memory: an update copies the
    gradients there, runs AdamW there, and copies the new weights back. The numbers are those of AdamW on the CPU.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: LearnerConfig) -> None:
        self._parameters = parameters
        self._offloaded = config.optimizer_offload
        self.masters = {name: _host_copy(each) for name, each in parameters.items()} if self._offloaded else parameters
        """Name -> what AdamW updates: the parameters themselves, or their copies on the host."""
        self._adamw = torch.optim.AdamW(
            self.masters.values(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )

    def step(self, *, lr: float) -> None:
        """Update every parameter that has a gradient."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        if self._offloaded:
            self._fetch_gradients()
        self._adamw.step()
        if self._offloaded:
            self._return_weights()

    def zero_grad(self) -> None:
        """Forget all gradients and their memory."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """``moment:parameter`` -> tensor of everything AdamW remembers; empty before the first update."""
        return {
            f"{moment}:{name}": self._adamw.state[master][moment]
            for name, master in self.masters.items()
            if master in self._adamw.state
            for moment in MOMENTS
        }

    def load_state(self, moments: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state` of an optimizer of the same parameters, offloaded or not.

        Raises:
            CheckpointError: the moments are of another model.
        """
        names = list(self.masters)
        expected = {f"{moment}:{name}" for name in names for moment in MOMENTS} if moments else set()
        if expected != set(moments):
            odd = sorted(expected ^ set(moments))
            raise CheckpointError(f"optimizer state is of another model: {len(odd)} names differ, first {odd[0]!r}")
        state = {
            index: {moment: moments[f"{moment}:{name}"] for moment in MOMENTS}
            for index, name in enumerate(names)
            if moments
        }
        self._adamw.load_state_dict({**self._adamw.state_dict(), "state": state})

    def _fetch_gradients(self) -> None:
        for name, master in self.masters.items():
            gradient = self._parameters[name].grad
            master.grad = None if gradient is None else gradient.to("cpu")

    @torch.no_grad()
    def _return_weights(self) -> None:
        for name, master in self.masters.items():
            self._parameters[name].copy_(master)
            master.grad = None


def _host_copy(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to("cpu", copy=True))
