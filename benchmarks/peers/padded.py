"""transformers as it comes: right-padded rows with an attention mask, logits of every position."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from benchmarks.peers.interface import Peer, Setting
from benchmarks.peers.plain_loop import PlainLoop, autocast, cispo, token_logprobs
from benchmarks.workload import Workload
from lambdapo_async.packing import TrainingSequence


def build_padded(setting: Setting) -> Peer:
    """Rows in order of arrival, as many at a time as fit the token budget at their longest one's length."""
    budget = setting.config.learner.micro_batch_tokens

    def slots(workload: Workload) -> int:
        return sum(len(rows) * _longest(rows) for rows in _micro_batches(workload.sequences, budget))

    return PlainLoop(setting, attention="sdpa", losses=_losses, slots=slots)


def _micro_batches(sequences: Sequence[TrainingSequence], budget: int) -> list[list[TrainingSequence]]:
    batches: list[list[TrainingSequence]] = [[]]
    for sequence in sequences:
        grown = [*batches[-1], sequence]
        if batches[-1] and len(grown) * _longest(grown) > budget:
            batches.append([sequence])
        else:
            batches[-1] = grown
    return batches


def _longest(rows: Sequence[TrainingSequence]) -> int:
    return max(len(row.token_ids) for row in rows)


def _losses(model: PreTrainedModel, workload: Workload, setting: Setting) -> Iterator[Tensor]:
    for rows in _micro_batches(workload.sequences, setting.config.learner.micro_batch_tokens):

        def padded(columns: list[NDArray[np.generic]]) -> Tensor:
            return pad_sequence([torch.from_numpy(column) for column in columns], batch_first=True).to(setting.device)

        ids_BL = padded([row.token_ids.astype(np.int64) for row in rows])
        attention_mask_BL = padded([np.ones(len(row.token_ids), np.int64) for row in rows])
        mask_BL = padded([row.loss_mask for row in rows])
        behavior_BL = padded([row.behavior_logprobs for row in rows])
        advantages_B1 = torch.tensor([[row.advantage] for row in rows], device=setting.device)
        with autocast(setting.device):
            logits_BLV = model(input_ids=ids_BL, attention_mask=attention_mask_BL, use_cache=False).logits
        yield cispo(
            token_logprobs(logits_BLV[:, :-1], ids_BL[:, 1:]),
            behavior_BL[:, 1:],
            advantages_B1,
            mask_BL[:, 1:],
            num_loss_tokens=workload.num_loss_tokens,
        )
