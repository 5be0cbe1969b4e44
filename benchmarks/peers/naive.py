"""Our packing and attention under the usual output layer: float32 logits of every packed token."""

from collections.abc import Iterator

from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.peers.interface import Peer, Setting
from benchmarks.peers.plain_loop import PlainLoop, autocast, cispo, token_logprobs
from benchmarks.workload import Workload
from lambdapo_async.packing import pack
from learner.attention import PackedLayout, select_attention


def build_naive(setting: Setting) -> Peer:
    """What leaving logits out of memory is worth, everything else equal."""
    attention = select_attention(setting.device)
    return PlainLoop(setting, attention=attention, losses=_losses, slots=lambda workload: workload.num_tokens)


def _losses(model: PreTrainedModel, workload: Workload, setting: Setting) -> Iterator[Tensor]:
    for packed in pack(workload.sequences, token_budget=setting.config.learner.micro_batch_tokens):
        batch = packed.to(setting.device)
        with autocast(setting.device):
            logits_TV = model(
                input_ids=batch.input_ids_T[None],
                position_ids=batch.position_ids_T[None],
                use_cache=False,
                layout=PackedLayout(batch.cu_seqlens, batch.max_seqlen),
            ).logits[0]
        yield cispo(
            token_logprobs(logits_TV[:-1], batch.input_ids_T[1:]),
            batch.behavior_logprobs_T[1:],
            batch.advantages_T[1:],
            batch.loss_mask_T[1:],
            num_loss_tokens=workload.num_loss_tokens,
        )
