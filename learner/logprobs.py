"""log pi of the tokens that carry loss, without the logits of the others.

T packed tokens, S of them with loss, E hidden size.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lambdapo_async.packing import MicroBatch
from learner.attention import PackedLayout
from learner.projection import CHUNK_LOGITS, project


def packed_logprobs(model: PreTrainedModel, micro_batch: MicroBatch, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each packed token under the model, and the entropy it was drawn with.

    Logits at t - 1 predict token t, divided by the temperature as the sampler divides them, normalised in
    float32. Only positions before a loss token reach the output layer: prompts cost no logits.

    Args:
        model: a causal language model in evaluation mode, its attention chosen by ``select_attention``; its own
            parameters whole (see :class:`LogprobModel`).
        micro_batch: a document's first token has no loss, for nothing predicts it.
        temperature: of the behavior policy's softmax.

    Returns:
        ``logprobs_T`` and ``entropy_T`` in nats, both float32, with gradient, and 0 where ``loss_mask_T`` is False.
    """
    layout = PackedLayout(micro_batch.cu_seqlens, micro_batch.max_seqlen)
    hidden_TE = model.get_decoder()(
        input_ids=micro_batch.input_ids_T[None],
        position_ids=micro_batch.position_ids_T[None],
        use_cache=False,
        layout=layout,
    ).last_hidden_state[0]
    index_S = micro_batch.loss_mask_T.nonzero()[:, 0]
    logprobs_S, entropy_S = project(
        model.get_output_embeddings(),
        hidden_TE.index_select(0, index_S - 1),
        micro_batch.input_ids_T.index_select(0, index_S),
        temperature=temperature / logit_scale(model),
        soft_cap=soft_cap(model),
        chunk_logits=CHUNK_LOGITS[hidden_TE.device.type],
    )
    zeros_T = torch.zeros_like(micro_batch.behavior_logprobs_T)
    return zeros_T.index_copy(0, index_S, logprobs_S), zeros_T.index_copy(0, index_S, entropy_S)


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

    def __init__(self, model: PreTrainedModel, *, temperature: float) -> None:
        super().__init__()
        self.model = model
        self._temperature = temperature

    def forward(self, micro_batch: MicroBatch, temperature: float | None = None) -> tuple[Tensor, Tensor]:
        """``logprobs_T`` and ``entropy_T`` of :func:`packed_logprobs`; None is the run's temperature."""
        chosen = self._temperature if temperature is None else temperature
        return packed_logprobs(self.model, micro_batch, temperature=chosen)
