"""Our packing and attention under the usual output layer: float32 logits of every packed token."""

from collections.abc import Iterator

from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.peers.interface import Peer, Setting
from benchmarks.peers.plain_loop import PlainLoop, autocast, cispo
from benchmarks.workload import Workload
from lambdapo_async.packing import pack
from learner.attention import select_attention


def build_naive(setting: Setting) -> Peer:
    """What leaving logits out of memory is worth, everything else equal."""
    attention = select_attention(setting.device)
    budget = setting.config.learner.micro_batch_tokens
    return PlainLoop(setting, attention=attention, losses=_losses, slots=lambda each: each.packed_tokens(budget))


def _losses(model: PreTrainedModel, workload: Workload, setting: Setting) -> Iterator[Tensor]:
    for packed in pack(workload.sequences, token_budget=setting.config.learner.micro_batch_tokens):
        batch = packed.to(setting.device)
        num_fed = batch.layout.num_tokens
        with autocast(setting.device):
            logits_TV = model(
                input_ids=batch.input_ids_T[None, :num_fed],
                position_ids=batch.position_ids_T[None, :num_fed],
                use_cache=False,
                layout=batch.layout,
            ).logits[0]
        yield cispo(
            logits_TV.float().log_softmax(dim=-1)[batch.predictor_T, batch.input_ids_T],
            batch.behavior_logprobs_T,
            batch.advantages_T,
            batch.loss_mask_T,
            num_loss_tokens=workload.num_loss_tokens,
        )
