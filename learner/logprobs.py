"""log pi of the tokens that carry loss, without the logits of the others.

T packed tokens, S of them with loss, V vocabulary, E hidden size.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lambdapo_async.packing import MicroBatch
from learner.attention import PackedLayout

CHUNK_LOGITS = 2**26
"""Logits (float32, so 256 MiB) that exist at once; larger projections are recomputed in the backward pass."""


def packed_logprobs(
    model: PreTrainedModel, micro_batch: MicroBatch, *, temperature: float, chunk_logits: int = CHUNK_LOGITS
) -> tuple[Tensor, Tensor]:
    """Log-probability of each packed token under the model, and the entropy it was drawn with.

    Logits at t - 1 predict token t, divided by the temperature as the sampler divides them, normalised in
    float32. Only positions before a loss token reach the output layer: prompts cost no logits.

    Args:
        model: a causal language model in evaluation mode, its attention chosen by ``select_attention``.
        micro_batch: a document's first token has no loss, for nothing predicts it.
        temperature: of the behavior policy's softmax.
        chunk_logits: bound on the logits in memory.

    Returns:
        ``logprobs_T``, float32, and ``entropy_T``, float32, in nats and without gradient; both 0 where
        ``loss_mask_T`` is False.
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
        temperature=temperature,
        chunk_logits=chunk_logits,
    )
    zeros_T = torch.zeros_like(micro_batch.behavior_logprobs_T)
    return zeros_T.index_copy(0, index_S, logprobs_S), zeros_T.index_copy(0, index_S, entropy_S)


def project(
    head: nn.Linear, hidden_SE: Tensor, target_S: Tensor, *, temperature: float, chunk_logits: int
) -> tuple[Tensor, Tensor]:
    """[S] log-probability of each target and [S] entropy, at most ``chunk_logits`` logits at a time."""
    chunk = max(1, chunk_logits // head.out_features)
    if hidden_SE.shape[0] <= chunk:
        return _logprobs_and_entropy(head, hidden_SE, target_S, temperature)
    parts = [
        checkpoint(
            _logprobs_and_entropy, head, hidden, target, temperature,
            use_reentrant=False, preserve_rng_state=False,
        )
        for hidden, target in zip(torch.split(hidden_SE, chunk), torch.split(target_S, chunk), strict=True)
    ]  # fmt: skip
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _logprobs_and_entropy(
    head: nn.Linear, hidden_SE: Tensor, target_S: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logits_SV = head(hidden_SE).float()
    if temperature != 1.0:
        logits_SV = logits_SV / temperature
    log_softmax_SV = logits_SV.log_softmax(dim=-1)
    detached_SV = log_softmax_SV.detach()
    entropy_S = -(detached_SV.exp() * detached_SV).sum(dim=-1)
    return log_softmax_SV.gather(1, target_S[:, None])[:, 0], entropy_S
