"""Proves, before anything is trained, that a model can be trained on packed sequences."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lambdapo_async.errors import ConfigError
from learner.attention import PackedLayout
from learner.logprobs import logit_scale, soft_cap

DOCUMENT_LENGTHS = (5, 7)
TOLERANCE = 0.5
"""Largest difference of logits, in units of their standard deviation: rounding is far below, a leak at 3 or more."""

PLAIN_LAYERS = {"full_attention", "sliding_attention"}
"""Layer types of transformers that the attention layer implements; chunks, for one, would be passed over silently."""


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Compare the last of two packed documents with the same document alone.

    Catches attention, position or recurrence that runs across documents, and output layers that do more than
    multiply, scale and cap: ``learner.logprobs`` applies the bare layer, ``logit_scale`` and ``soft_cap``.

    Raises:
        ConfigError: the logits differ, or the model has attention that only shows in longer documents.
    """
    kinds = set(model.config.get_text_config().to_dict().get("layer_types") or ()) - PLAIN_LAYERS
    if kinds:
        raise ConfigError(
            f"{type(model).__name__} has layers of {', '.join(sorted(kinds))}, which packed training does not support: "
            "choose a model with full or sliding-window attention"
        )
    total = sum(DOCUMENT_LENGTHS)
    ids_T = torch.arange(1, 1 + total, device=model.device) % model.get_input_embeddings().weight.shape[0]
    hidden = _hidden(model, ids_T, DOCUMENT_LENGTHS)[-DOCUMENT_LENGTHS[-1] :]
    packed = model.get_output_embeddings()(hidden) * logit_scale(model)
    if (cap := soft_cap(model)) is not None:
        packed = cap * torch.tanh(packed / cap)
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
