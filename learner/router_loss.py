"""The load-balancing loss of a mixture of experts (Switch Transformer, arXiv:2101.03961, equations 4 to 6), of a whole
update (arXiv:2501.11873).

R routers, X experts, K of them per token; S tokens with loss, and T that the model is fed. The loss is X times the sum
over experts of (share of the choices) x (mean probability), averaged over routers; its minimum, with tokens spread
evenly, is 1. Only probabilities carry gradient, so once the shares of a whole update are known the loss is a sum over
tokens: it is the same however these are packed and whichever rank has them. A token counts where it is predicted, for
a prompt is packed once or several times.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from lambdapo_async.errors import ConfigError
from lambdapo_async.packing import MicroBatch
from learner.context_parallel import add_parts
from learner.logprobs import predicted_tokens
from learner.parallel import Ranks


def expert_choices(logits_TX: Sequence[Tensor], rows_S: Tensor, *, top_k: int) -> Tensor:
    """[R, X] float32 how often each router chooses each expert for the tokens in ``rows_S``."""
    counts = []
    for layer_TX in logits_TX:
        chosen_SK = layer_TX.float().index_select(0, rows_S).topk(top_k).indices
        counts.append(torch.bincount(chosen_SK.flatten(), minlength=layer_TX.shape[-1]))
    return torch.stack(counts).float()


def expert_costs(choices_RX: Tensor, *, top_k: int) -> Tensor:
    """[R, X] what a token with probability 1 for an expert adds to the loss, given all choices of an update."""
    num_routers, num_experts = choices_RX.shape
    total_R1 = choices_RX.sum(dim=1, keepdim=True).clamp(min=1.0)
    return num_experts * (choices_RX / total_R1) / (total_R1 / top_k) / num_routers


def balance_loss(logits_TX: Sequence[Tensor], rows_S: Tensor, costs_RX: Tensor) -> Tensor:
    """What the tokens in ``rows_S`` add to the loss of an update."""
    losses = [
        (layer_TX.float().index_select(0, rows_S).softmax(dim=-1) * cost_X).sum()
        for layer_TX, cost_X in zip(logits_TX, costs_RX, strict=True)
    ]
    return torch.stack(losses).sum()


class RouterLoss:
    """Listens to the routers of a model's decoder.

    Args:
        model: made to return its routers' logits.

    Raises:
        ConfigError: the model has no routers.
    """

    def __init__(self, model: PreTrainedModel, ranks: Ranks) -> None:
        config = model.config.get_text_config()
        if "num_experts_per_tok" not in config.to_dict():
            raise ConfigError(
                f"learner.router_aux_coef needs a mixture of experts, and {type(model).__name__} is none: set it to 0"
            )
        config.output_router_logits = True
        self._ranks = ranks
        self._top_k: int = config.num_experts_per_tok
        self._logits_TX: Sequence[Tensor] = ()
        model.get_decoder().register_forward_hook(self._remember)

    def costs(self, micro_batches: Sequence[MicroBatch], forward: Callable[[MicroBatch], object]) -> Tensor:
        """On all ranks: [R, X] float32 :func:`expert_costs` of an update, by one forward pass over it.

        Args:
            micro_batches: this rank's share of the update.
            forward: runs the model.
        """
        counts = []
        for micro_batch in micro_batches:
            forward(micro_batch)
            counts.append(expert_choices(self._take(), self._rows(micro_batch), top_k=self._top_k))
        choices_RX = torch.stack(counts).sum(dim=0)
        if self._ranks.context is not None:
            choices_RX = add_parts(choices_RX, self._ranks.context)
        shares = [share.view_as(choices_RX) for (share,) in self._ranks.collect([choices_RX.flatten()])]
        return expert_costs(torch.stack(shares).sum(dim=0), top_k=self._top_k).to(choices_RX.device)

    def loss(self, micro_batch: MicroBatch, costs_RX: Tensor) -> Tensor:
        """:func:`balance_loss` of the forward pass just made, of this rank's tokens."""
        return balance_loss(self._take(), self._rows(micro_batch), costs_RX)

    def _rows(self, micro_batch: MicroBatch) -> Tensor:
        return predicted_tokens(micro_batch, self._ranks.context)[1]

    def _take(self) -> Sequence[Tensor]:
        """The logits of the last forward pass, whose graph is forgotten here."""
        logits_TX, self._logits_TX = self._logits_TX, ()
        return logits_TX

    def _remember(self, _: torch.nn.Module, __: tuple[object, ...], output: MoeModelOutputWithPast) -> None:
        self._logits_TX = output.router_logits
