"""Proves, before anything is trained, that a model can be trained on packed sequences."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from lambdapo_async.errors import ConfigError
from lambdapo_async.packed_layout import Segment, packed_layout
from learner.logprobs import logit_scale, soft_cap

SEGMENTS = (Segment(5), Segment(4), Segment(6, range(5, 9)), Segment(3, range(5, 9)))
"""A document, a prompt, and two completions of it; the second is checked."""
TOLERANCE, TOLERANCE_BFLOAT16 = 0.1, 0.5
"""Largest difference of logits by the type they are computed in, in units of their standard deviation: rounding is far
below, even where it sends a token to another expert; a leak of a trained model is at 1 or more."""

PLAIN_LAYERS = {"full_attention", "sliding_attention"}
"""Layer types of transformers that the attention layer implements; chunks, for one, would be passed over silently."""


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Compare a rollout packed behind another document, its prompt shared with a sibling, with the rollout alone.

    Catches attention, position or recurrence that runs across rollouts or not from prompt to completion, and output
    layers that do more than multiply, scale and cap: ``learner.logprobs`` applies the bare layer, ``logit_scale`` and
    ``soft_cap``.

    Raises:
        ConfigError: the logits differ, the model has attention that only shows in longer documents, or it does not run.
    """
    kinds = set(model.config.get_text_config().to_dict().get("layer_types") or ()) - PLAIN_LAYERS
    if any(isinstance(module, nn.Conv1d) for module in model.get_decoder().modules()):
        kinds.add("convolutions")  # as of state-space models; untrained, they mix so little that no logit shows it
    if kinds:
        raise ConfigError(
            f"{type(model).__name__} has layers of {', '.join(sorted(kinds))}, which packed training does not support: "
            "choose a model with full or sliding-window attention"
        )
    try:
        packed, alone = _logits_twice(model)
    except torch.OutOfMemoryError:
        raise  # no fault of the model's kind
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:  # whatever others' code says to our inputs
        raise ConfigError(
            f"{type(model).__name__} cannot be run on packed sequences, choose another model: {error!s:.300}"
        ) from error
    difference = float((packed - alone).abs().max() / alone.std())
    is_rounded = torch.is_autocast_enabled(model.device.type) or model.dtype == torch.bfloat16
    if not difference < (TOLERANCE_BFLOAT16 if is_rounded else TOLERANCE):
        raise ConfigError(
            f"{type(model).__name__} cannot be trained on packed sequences: logits of a rollout change by "
            f"{difference:.3g} of their standard deviation when others lie beside it"
        )


def packable_positions(config: PreTrainedConfig) -> int:
    """Longest sequence that the model was made for, and computes alike whatever lies beside it.

    Longrope (arXiv:2402.13753) stretches the positions of a whole batch as soon as one of its sequences is long: none
    may be.
    """
    text = config.get_text_config()
    rope = text.to_dict().get("rope_parameters") or {}
    by_layer = [each for each in rope.values() if isinstance(each, dict)]
    stretched = [each for each in (rope, *by_layer) if each.get("rope_type") == "longrope"]
    limits: list[int] = [text.max_position_embeddings]
    limits += [each["original_max_position_embeddings"] for each in stretched]
    return min(limits)


def _logits_twice(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Logits of the checked rollout among others, as ``learner.logprobs`` makes them, and of the rollout alone."""
    total, last = sum(segment.length for segment in SEGMENTS), SEGMENTS[-1]
    rows = torch.tensor([*last.prompt, *range(total - last.length, total)], device=model.device)
    ids_T = torch.arange(1, 1 + total, device=model.device) % model.get_input_embeddings().weight.shape[0]
    hidden = model.get_decoder()(**_inputs(ids_T, SEGMENTS)).last_hidden_state[0]
    packed = model.get_output_embeddings()(hidden[rows]) * logit_scale(model)
    if (cap := soft_cap(model)) is not None:
        packed = cap * torch.tanh(packed / cap)
    return packed, model(**_inputs(ids_T[rows], (Segment(len(rows)),))).logits[0]


def _inputs(ids_T: Tensor, segments: Sequence[Segment]) -> dict[str, object]:
    positions = [len(each.prompt) + torch.arange(each.length, device=ids_T.device) for each in segments]
    return {
        "input_ids": ids_T[None],
        "position_ids": torch.cat(positions)[None],
        "use_cache": False,
        "layout": packed_layout(segments).to(ids_T.device),
    }
