"""log pi of the tokens that carry loss, without the logits of the others.

T packed tokens, of which the model is fed all that others follow, t of them on this rank; S with loss, E hidden size.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from lambdapo_async.packing import MicroBatch
from learner.context_parallel import add_parts, own_tokens, shard_tokens
from learner.projection import CHUNK_LOGITS, KEPT_LOGITS, project


def packed_logprobs(
    model: PreTrainedModel,
    micro_batch: MicroBatch,
    *,
    temperature: float,
    context: dist.ProcessGroup | None = None,
    keeps_logits: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each packed token under the model, and the entropy it was drawn with.

    The logits that predict a token are divided by the temperature as the sampler divides them, normalised in
    float32. Only positions before a loss token reach the output layer: prompts cost no logits.

    Args:
        model: a causal language model in evaluation mode, its attention chosen by ``select_attention``; its own
            parameters whole (see :class:`LogprobModel`).
        micro_batch: a rollout's first token has no loss, for nothing predicts it.
        temperature: of the behavior policy's softmax.
        context: ranks that share the tokens; all call this, with attention from ``sharded_backend``.
        keeps_logits: whether the backward pass finds the first ``KEPT_LOGITS`` of the device, or computes all again.

    Returns:
        ``logprobs_T`` and ``entropy_T`` in nats, both float32, with gradient, and 0 where ``loss_mask_T`` is False;
        of all T tokens on every rank.
    """
    num_fed = micro_batch.layout.num_tokens
    ids_t, positions_t = micro_batch.input_ids_T[:num_fed], micro_batch.position_ids_T[:num_fed]
    if context is not None:
        ids_t, positions_t = shard_tokens(ids_t, context), shard_tokens(positions_t, context)
    index_S, rows_S = predicted_tokens(micro_batch, context)
    hidden_tE = model.get_decoder()(
        input_ids=ids_t[None],
        position_ids=positions_t[None],
        use_cache=False,
        layout=micro_batch.layout,
    ).last_hidden_state[0]
    logprobs_S, entropy_S = project(
        model.get_output_embeddings(),
        hidden_tE.index_select(0, rows_S),
        micro_batch.input_ids_T.index_select(0, index_S),
        temperature=temperature / logit_scale(model),
        soft_cap=soft_cap(model),
        chunk_logits=CHUNK_LOGITS[hidden_tE.device.type],
        kept_logits=KEPT_LOGITS[hidden_tE.device.type] if keeps_logits else 0,
    )
    zeros_T = torch.zeros_like(micro_batch.behavior_logprobs_T)
    logprobs_T, entropy_T = (zeros_T.index_copy(0, index_S, found_S) for found_S in (logprobs_S, entropy_S))
    if context is None:
        return logprobs_T, entropy_T
    logprobs_T, entropy_T = add_parts(torch.stack([logprobs_T, entropy_T]), context)
    return logprobs_T.clone(), entropy_T.clone()  # FSDP warns of views


def predicted_tokens(micro_batch: MicroBatch, context: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """[S] tokens with loss that this rank predicts, and [S] those of its own t tokens that predict them."""
    index_S = micro_batch.loss_indices()
    predictor_S = micro_batch.predictor_T.index_select(0, index_S)
    if context is None:
        return index_S, predictor_S
    # A rank predicts what comes after its tokens, be it another rank's.
    own = own_tokens(micro_batch.layout.num_tokens, context)
    is_own_S = (predictor_S >= own.start) & (predictor_S < own.stop)
    return index_S[is_own_S], predictor_S[is_own_S] - own.start


def logit_scale(model: PreTrainedModel) -> float:
    """What the model multiplies the output layer's logits by: Cohere scales them up or down, Granite divides them."""
    settings = vars(model.config.get_text_config())
    scale: float = settings.get("logit_scale", 1.0) / settings.get("logits_scaling", 1.0)
    return scale


def soft_cap(model: PreTrainedModel) -> float | None:
    """c where the model turns logits into c tanh(logit / c), as Gemma does; None for most."""
    cap: float | None = vars(model.config.get_text_config()).get("final_logit_softcapping")
    return cap


class LogprobModel(nn.Module):
    """:func:`packed_logprobs` as the ``forward`` of a module: the root that FSDP2 shards.

    ``fully_shard`` gathers parameters in hooks around ``forward``, and the learner calls neither the model's nor
    the output layer's. So: ``fully_shard(layer)`` for every decoder layer, then ``fully_shard(LogprobModel(...))``,
    whose own unit is what is left (embedding, last norm, output layer, tied or not), whole while this ``forward``
    and its backward pass run. ``model.named_parameters()`` keeps its names.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        temperature: float,
        context: dist.ProcessGroup | None = None,
        keeps_logits: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self._temperature, self._context, self._keeps_logits = temperature, context, keeps_logits

    def forward(self, micro_batch: MicroBatch, temperature: float | None = None) -> tuple[Tensor, Tensor]:
        """``logprobs_T`` and ``entropy_T`` of :func:`packed_logprobs`; None is the run's temperature."""
        chosen = self._temperature if temperature is None else temperature
        return packed_logprobs(
            self.model, micro_batch, temperature=chosen, context=self._context, keeps_logits=self._keeps_logits
        )
