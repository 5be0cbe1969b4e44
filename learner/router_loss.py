"""The load-balancing loss of a mixture of experts (Switch Transformer, arXiv:2101.03961, equations 4 to 6).

T packed tokens, X experts, K of them per token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from lambdapo_async.errors import ConfigError


def balance_loss(logits_TX: Sequence[Tensor], *, top_k: int) -> Tensor:
    """X times the sum over experts of (share of the choices) x (mean probability), averaged over layers.

    Its minimum, with tokens spread evenly, is 1. Only the probabilities carry gradient.
    """
    losses = []
    for layer_TX in logits_TX:
        probability_TX = layer_TX.float().softmax(dim=-1)
        chosen_TK = probability_TX.topk(top_k).indices
        num_experts = layer_TX.shape[-1]
        share_X = torch.bincount(chosen_TK.flatten(), minlength=num_experts) / chosen_TK.numel()
        losses.append(num_experts * (share_X * probability_TX.mean(dim=0)).sum())
    return torch.stack(losses).mean()


class RouterLoss:
    """Listens to the routers of a model's decoder."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Make the decoder return its routers' logits.

        Raises:
            ConfigError: the model has no routers.
        """
        config = model.config.get_text_config()
        if "num_experts_per_tok" not in config.to_dict():
            raise ConfigError(
                f"learner.router_aux_coef needs a mixture of experts, and {type(model).__name__} is none: set it to 0"
            )
        config.output_router_logits = True
        self._top_k: int = config.num_experts_per_tok
        self._logits_TX: Sequence[Tensor] = ()
        model.get_decoder().register_forward_hook(self._remember)

    def take(self) -> Tensor:
        """The loss of the last forward pass, as the mean over its tokens; its graph is forgotten here."""
        logits_TX, self._logits_TX = self._logits_TX, ()
        return balance_loss(logits_TX, top_k=self._top_k)

    def _remember(self, _: torch.nn.Module, __: tuple[object, ...], output: MoeModelOutputWithPast) -> None:
        self._logits_TX = output.router_logits
