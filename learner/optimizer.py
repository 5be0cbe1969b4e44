"""AdamW on float32 masters: the parameters themselves, weights beside them, or in the host's memory."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from lambdapo_async.config.learner import LearnerConfig
from lambdapo_async.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""What AdamW keeps per parameter."""


class MasterOptimizer:
    """Fused AdamW on the float32 masters of the trained parameters.

    A parameter is its own master, unless the model computes with it in bfloat16, or ``learner.optimizer_offload`` puts
    masters and moments into the host's memory: then an update hands the gradients to the masters, runs AdamW there,
    and copies the new weights back, rounded to nearest. The numbers are those of AdamW where the masters lie.

    Gradients are added up in float32 whatever the model computes in: each bfloat16 one is added to its sum, and freed,
    as soon as a backward pass has it.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], config: LearnerConfig, dtypes: Mapping[str, torch.dtype]
    ) -> None:
        """Set the masters apart.

        Args:
            parameters: float32; those of another type in ``dtypes`` are converted in place.
            dtypes: what the model computes with, by the names of ``parameters``.
        """
        self._parameters = parameters
        self.masters = {
            name: _master(each, dtypes[name], on_host=config.optimizer_offload) for name, each in parameters.items()
        }
        """Name -> what AdamW updates: the parameter itself, or its float32 weights beside it or on the host."""
        self._apart = {name: each for name, each in self.masters.items() if each is not parameters[name]}
        self._sums: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            if parameter.dtype != torch.float32:
                _add_up_in_float32(parameter, name, self._sums)
        self._adamw = torch.optim.AdamW(
            self.masters.values(), betas=config.betas, weight_decay=config.weight_decay, fused=True
        )

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradient of all backward passes down to a norm of ``max_norm``; returns its norm before that."""
        for name, gradient in self._sums.items():
            self._parameters[name].grad = gradient
        self._sums.clear()
        return torch.nn.utils.clip_grad_norm_(self._parameters.values(), max_norm)

    def step(self, *, lr: float) -> None:
        """After :meth:`clip`: update every parameter that has a gradient."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        for name, master in self._apart.items():
            gradient = self._parameters[name].grad
            master.grad = None if gradient is None else gradient.to(master.device)
        self._adamw.step()
        self._return_weights()

    def zero_grad(self) -> None:
        """Forget all gradients and their memory."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """``moment:parameter`` -> tensor of everything AdamW remembers; nothing of what never had a gradient."""
        return {
            f"{moment}:{name}": self._adamw.state[master][moment]
            for name, master in self.masters.items()
            if master in self._adamw.state
            for moment in MOMENTS
        }

    def load_state(self, moments: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state` of an optimizer of the same parameters, offloaded or not.

        A parameter that no gradient had reached has no moments: of a mixture's bias that only chooses, or the part of
        a model that sees.

        Raises:
            CheckpointError: the moments are of another model.
        """
        reached = {name.partition(":")[2] for name in moments} & self.masters.keys()
        expected = {f"{moment}:{name}" for name in reached for moment in MOMENTS}
        if expected != set(moments):
            odd = sorted(expected ^ set(moments))
            raise CheckpointError(f"optimizer state is of another model: {len(odd)} names differ, first {odd[0]!r}")
        state = {
            index: {moment: moments[f"{moment}:{name}"] for moment in MOMENTS}
            for index, name in enumerate(self.masters)
            if name in reached
        }
        self._adamw.load_state_dict({**self._adamw.state_dict(), "state": state})

    @torch.no_grad()
    def _return_weights(self) -> None:
        for name, master in self._apart.items():
            self._parameters[name].copy_(master)
            master.grad = None


def _master(parameter: nn.Parameter, dtype: torch.dtype, *, on_host: bool) -> nn.Parameter:
    """The float32 weights of a parameter, which is of ``dtype`` from here on."""
    if dtype == parameter.dtype and not on_host:
        return parameter
    weights = parameter.detach()
    parameter.data = weights.to(dtype)
    return nn.Parameter(weights.to("cpu", copy=True) if on_host else weights)


def _add_up_in_float32(parameter: nn.Parameter, name: str, sums: dict[str, Tensor]) -> None:
    """From here on backward passes leave a gradient in ``sums``, and none at the parameter.

    A float32 gradient at a bfloat16 parameter would be simpler, but torch.compile refuses to trace one.
    """
    parameter.grad_dtype = None  # any: the sum comes back before the update
    parameter.register_post_accumulate_grad_hook(partial(_add, name, sums))  # type: ignore[no-untyped-call]


def _add(name: str, sums: dict[str, Tensor], parameter: Tensor) -> None:
    assert parameter.grad is not None
    if name in sums:
        sums[name] += parameter.grad
    else:
        sums[name] = parameter.grad.float()
    parameter.grad = None
