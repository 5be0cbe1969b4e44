"""Proves, before anything is trained, that a model can be trained on packed sequences."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lambdapo_async.errors import ConfigError
from learner.attention import PackedLayout

DOCUMENT_LENGTHS = (5, 7)
TOLERANCE = 0.5
"""Largest difference of logits, in units of their standard deviation: rounding is far below, a leak at 3 or more."""


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Compare the last of two packed documents with the same document alone.

    Catches attention, position or recurrence that runs across documents, and output layers that do more than
    multiply (logit scaling, soft caps): ``learner.logprobs`` applies the bare layer.

    Raises:
        ConfigError: the logits differ.
    """
    total = sum(DOCUMENT_LENGTHS)
    ids_T = torch.arange(1, 1 + total, device=model.device) % model.get_input_embeddings().weight.shape[0]
    packed = model.get_output_embeddings()(_hidden(model, ids_T, DOCUMENT_LENGTHS))[-DOCUMENT_LENGTHS[-1] :]
    own_ids_T = ids_T[-DOCUMENT_LENGTHS[-1] :]
    alone = model(**_inputs(own_ids_T, DOCUMENT_LENGTHS[-1:])).logits[0]
    difference = float((packed - alone).abs().max() / alone.std())
    if not difference < TOLERANCE:
        raise ConfigError(
            f"{type(model).__name__} cannot be trained on packed sequences: logits of a document change by "
            f"{difference:.3g} of their standard deviation when another document precedes it"
        )


def _hidden(model: PreTrainedModel, ids_T: Tensor, lengths: tuple[int, ...]) -> Tensor:
    return model.get_decoder()(**_inputs(ids_T, lengths)).last_hidden_state[0]  # type: ignore[no-any-return]


def _inputs(ids_T: Tensor, lengths: tuple[int, ...]) -> dict[str, object]:
    positions_T = torch.cat([torch.arange(length, device=ids_T.device) for length in lengths])
    marks = torch.tensor([0, *lengths], device=ids_T.device).cumsum(0).to(torch.int32)
    return {
        "input_ids": ids_T[None],
        "position_ids": positions_T[None],
        "use_cache": False,
        "layout": PackedLayout(marks, max(lengths)),
    }
